import pytest
import torch

from shardprune.errors import SolverError
from shardprune.solvers import sparsegpt
from shardprune.solvers.factor import factorise
from shardprune.solvers.methods import DAMPING, Target
from shardprune.solvers.pattern import Unstructured, parse_pattern
from shardprune.solvers.statistics import InputStatistics

BLOCK = 128


def inputs(samples: int, tokens: int, cols: int, seed: int, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Correlated inputs [samples, tokens, cols], some always zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) * 0.3 + torch.eye(cols)
    drawn = torch.randn(samples, tokens, cols, generator=generator) @ mixing
    drawn[..., list(dead)] = 0
    return drawn


def gathered(x: torch.Tensor, device: str = "cpu") -> InputStatistics:
    statistics = InputStatistics.empty("gram", x.shape[-1], device)
    for wave in x.to(device).split(2):
        statistics.add(wave, len(wave))
    return statistics


def plain_sparsegpt(weight, x, sparsity=None, n_of_m=None):
    """Section 4 of the design, column by column in float64: returns the pruned weight and the mask."""
    w = weight.double().clone()
    rows, cols = w.shape
    tokens = x.double().reshape(-1, cols)
    h = 2 / x.shape[0] * tokens.T @ tokens
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * h.diagonal().mean() * torch.eye(cols, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(cols):
        if n_of_m is None and j % BLOCK == 0:
            end = min(j + BLOCK, cols)
            scores = (w[:, j:end] ** 2 / u.diagonal()[j:end] ** 2).flatten()
            count = int(sparsity * rows * end + 0.5) - int(sparsity * rows * j + 0.5)
            chosen = torch.zeros(scores.numel(), dtype=torch.bool)
            chosen[scores.argsort(stable=True)[:count]] = True
            mask[:, j:end] = chosen.view(rows, end - j)
        if n_of_m is not None and j % n_of_m[1] == 0:
            n, m = n_of_m
            end = min(j + m, cols)
            scores = w[:, j:end] ** 2 / u.diagonal()[j:end] ** 2
            order = scores.argsort(dim=1, stable=True)[:, : max(0, end - j - n)]
            mask[:, j:end] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
        error = torch.where(mask[:, j], w[:, j], 0) / u[j, j]
        w[:, j:] -= torch.outer(error, u[j, j:])
        w[mask[:, j], j] = 0
    return w.float(), mask


SHAPES = [(24, 64), (40, 200), (16, 128), (33, 300), (8, 129)]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7])
def test_unstructured_agrees_with_the_plain_formulation(rows, cols, sparsity, device):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    x = inputs(6, 80, cols, seed=cols)
    expected, mask = plain_sparsegpt(weight, x, sparsity=sparsity)
    solution = sparsegpt.prune(weight.to(device), gathered(x, device), Unstructured(), sparsity)
    assert torch.equal(solution.mask.cpu(), mask)
    assert relative(solution.weight, expected) < 1e-4
    assert int(mask.sum()) == int(rows * cols * sparsity + 0.5)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8", "3:5", "7:20", "50:150"])
def test_n_of_m_agrees_with_the_plain_formulation(rows, cols, pattern, device):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    x = inputs(6, 80, cols, seed=cols)
    n, m = (int(part) for part in pattern.split(":"))
    expected, mask = plain_sparsegpt(weight, x, n_of_m=(n, m))
    solution = sparsegpt.prune(weight.to(device), gathered(x, device), parse_pattern(pattern), 1 - n / m)
    assert torch.equal(solution.mask.cpu(), mask)
    assert relative(solution.weight, expected) < 1e-4
    assert parse_pattern(pattern).holds(solution.weight)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_dead_inputs_get_weight_zero(pattern, device):
    dead = (0, 3, 127, 128, 150)
    weight = torch.randn(20, 160, generator=torch.Generator().manual_seed(0))
    x = inputs(6, 80, 160, seed=1, dead=dead)
    kwargs = {"sparsity": 0.5} if pattern == "unstructured" else {"n_of_m": (2, 4)}
    expected, _ = plain_sparsegpt(weight, x, **kwargs)
    solution = sparsegpt.prune(weight.to(device), gathered(x, device), parse_pattern(pattern), 0.5)
    assert not solution.weight[:, list(dead)].any()
    assert torch.equal(solution.weight.cpu() == 0, expected == 0)
    assert relative(solution.weight, expected) < 1e-4


MIXED = [
    ("unstructured", 24, 0.5),
    ("2:4", 9, 0.5),
    ("unstructured", 17, 0.7),
    ("unstructured", 5, 0.0),
    ("2:4", 8, 0.5),
]


def test_projections_of_one_input_get_the_zeros_that_each_would_get_alone(device):
    statistics = gathered(inputs(6, 80, 200, seed=2, dead=(1, 130)), device)
    generator = torch.Generator().manual_seed(3)
    targets = [
        Target(torch.randn(rows, 200, generator=generator).to(device), parse_pattern(pattern), sparsity)
        for pattern, rows, sparsity in MIXED
    ]
    kept = [target.weight.clone() for target in targets]
    together = sparsegpt.prune_together(targets, statistics)
    for target, weight, solution in zip(targets, kept, together, strict=True):
        alone = sparsegpt.prune(weight, statistics, target.pattern, target.sparsity)
        assert torch.equal(solution.mask, alone.mask)
        assert relative(solution.weight, alone.weight.cpu()) < 1e-5
        assert float(solution.lost) == pytest.approx(float(alone.lost), rel=1e-5)
        assert torch.equal(target.weight, weight)


@pytest.mark.parametrize("dead", [(), (0, 3, 127, 128, 150)])
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.02), ("2:4", 0.5)])
def test_the_sweep_knows_what_the_outputs_lose(pattern, sparsity, dead, device):
    weight = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    x = inputs(6, 80, 200, seed=1, dead=dead)
    x[..., 7] *= 100  # as the massive activations of real models
    solution = sparsegpt.prune(weight.to(device), gathered(x, device), parse_pattern(pattern), sparsity)
    change = weight.double() - solution.weight.cpu().double()
    expected = (x.double().reshape(-1, 200) @ change.T).square().sum()
    assert float(solution.lost) == pytest.approx(float(expected), rel=1e-5)


def test_a_pruning_that_loses_nothing_has_lost_nothing():
    x = inputs(6, 80, 64, seed=1)
    weight = torch.zeros(8, 64)
    assert float(sparsegpt.prune(weight, gathered(x), Unstructured(), 0.5).lost) == 0


def test_correction_lowers_the_output_error():
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    x = inputs(6, 80, 96, seed=1)
    solution = sparsegpt.prune(weight, gathered(x), Unstructured(), 0.5)
    tokens = x.reshape(-1, 96)
    corrected = (tokens @ (weight - solution.weight).T).norm()
    uncorrected = (tokens @ (weight * solution.mask).T).norm()
    assert corrected < 0.9 * uncorrected


def test_the_weight_given_is_left_alone():
    weight = torch.randn(16, 64)
    kept = weight.clone()
    sparsegpt.prune(weight, gathered(inputs(4, 40, 64, seed=0)), Unstructured(), 0.5)
    assert torch.equal(weight, kept)


def test_a_projection_that_shares_an_input_reuses_its_factor():
    statistics = gathered(inputs(4, 40, 64, seed=0))
    sparsegpt.prune(torch.randn(16, 64), statistics, Unstructured(), 0.5)
    assert statistics.factor(DAMPING) is statistics.factor(DAMPING)


@pytest.mark.parametrize("cols", [1, 70, 257, 600])  # below, at the edge of and above a leaf of the recursion
def test_factor_of_the_inverse(cols, device):
    x = inputs(6, 2 * cols, cols, seed=3)
    hessian = gathered(x, device).hessian
    factor = factorise(hessian.clone(), 0.01)
    upper = factor.steps.double() * factor.diagonal.double().unsqueeze(1)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(cols, device=device)
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(cols, dtype=torch.float64, device=device), atol=1e-3)


def test_damping_grows_until_the_hessian_is_positive_definite():
    indefinite = torch.eye(8) - 0.05 * torch.diag(torch.tensor([30.0] + [0.0] * 7))  # smallest eigenvalue -0.5
    factor = factorise(indefinite, 0.01)
    assert factor.retries == 2
    assert factor.damping == pytest.approx(1.0)


def test_a_hessian_that_no_damping_helps_is_an_error():
    with pytest.raises(SolverError, match="not positive definite with damping 1 after 2 retries"):
        factorise(torch.diag(torch.tensor([10.0, 10.0, -30.0])), 0.01)


def test_a_hessian_with_infinities_is_an_error():
    hessian = torch.eye(4)
    hessian[2, 2] = float("inf")
    with pytest.raises(SolverError, match="not finite"):
        factorise(hessian, 0.01)
