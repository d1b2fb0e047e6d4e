"""ALPS and least squares on masks, against plain formulations in float64."""

import pytest
import torch

from shardprune.errors import SolverError
from shardprune.solvers import alps, sparsegpt
from shardprune.solvers.least_squares import UnitGram, descend, refit
from shardprune.solvers.methods import METHODS, PENALTIES, PER_PENALTY, REFIT_STEPS, SUPPORT_STEPS, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.products import product
from shardprune.solvers.statistics import InputStatistics, output_error
from tests.solvers.test_sparsegpt import gathered, inputs, relative

DEAD = (0, 3, 127, 150)
SHAPES = [(24, 64), (40, 200), (8, 129)]
PATTERNS = ["unstructured", "2:4", "3:5", "50:150"]


def damped(x, damping=0.01):
    """X^T X and the ridge of a fraction of its mean diagonal, float64."""
    tokens = x.double().reshape(-1, x.shape[-1])
    gram = tokens.T @ tokens
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def plain_mask(scores, pattern, sparsity):
    """True at the smallest scores of all, or of every group."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if pattern == "unstructured":
        order = scores.flatten().argsort(stable=True)[: int(scores.numel() * sparsity + 0.5)]
        mask.view(-1)[order] = True
        return mask
    n, m = map(int, pattern.split(":"))
    for left in range(0, scores.shape[1], m):
        group = scores[:, left : left + m]
        order = group.argsort(dim=1, stable=True)[:, : max(0, group.shape[1] - n)]
        mask[:, left : left + m] = torch.zeros_like(group, dtype=torch.bool).scatter(1, order, True)
    return mask


def least_squares(weight, gram, mask):
    """Row by row, the kept weights whose outputs are nearest to the dense ones."""
    fitted = torch.zeros_like(weight, dtype=torch.float64)
    for row, (dense, gone) in enumerate(zip(weight.double(), mask, strict=True)):
        kept = (~gone).nonzero()[:, 0]
        fitted[row, kept] = torch.linalg.solve(gram[kept][:, kept], gram[kept] @ dense)
    return fitted


def plain_alps(weight, x, pattern, sparsity):
    """Equations 4 and 5 with the penalties' schedule, then the kept weights by least squares: weight and mask."""
    gram = damped(x)
    norms = gram.diagonal().sqrt()
    unit = gram / norms / norms[:, None]
    dense = weight.double() * norms
    dense[:, x.reshape(-1, x.shape[-1]).abs().sum(0) == 0] = 0
    sparse = dense.masked_fill(plain_mask(dense.abs(), pattern, sparsity), 0)
    dual = torch.zeros_like(dense)
    for penalty in PENALTIES:
        inverse = torch.linalg.inv(unit + penalty * torch.eye(len(unit), dtype=torch.float64))
        for _ in range(PER_PENALTY):
            full = (dense @ unit - dual + penalty * sparse) @ inverse
            sparse = full + dual / penalty
            mask = plain_mask(sparse.abs(), pattern, sparsity)
            sparse = sparse.masked_fill(mask, 0)
            dual = dual + penalty * (full - sparse)
    return least_squares(dense / norms, gram, mask).float(), mask


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_agrees_with_the_plain_formulation(rows, cols, pattern, dead, device):
    dead = tuple(place for place in dead if place < cols)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    x = inputs(6, 80, cols, seed=cols, dead=dead)
    expected, mask = plain_alps(weight, x, pattern, 0.6)
    kept, known = weight.clone(), parse_pattern(pattern)
    solution = alps.prune(weight.to(device), gathered(x, device), known, 0.6)
    assert int(solution.mask.sum()) == known.zeros(rows, cols, 0.6)
    assert known.holds(solution.weight)
    assert not solution.weight[:, list(dead)].any()
    assert not solution.weight[solution.mask].any()
    assert torch.equal(solution.mask.cpu(), mask)
    assert relative(solution.weight, expected) < 5e-3  # conjugate gradients stop near the end
    lost = [
        float(((weight - one) @ damped(x).float() * (weight - one)).sum()) for one in (solution.weight.cpu(), expected)
    ]
    assert lost[0] == pytest.approx(lost[1], rel=5e-4)
    assert torch.equal(weight, kept)
    assert (solution.iterations, solution.refit_steps) == (36, SUPPORT_STEPS)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_loses_less_than_sparsegpt_on_the_same_inputs(pattern, sparsity, device):
    for seed in range(3):
        weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(seed)).to(device)
        statistics = gathered(inputs(6, 80, 192, seed=seed), device)
        errors = [
            output_error(weight, method.prune(weight, statistics, parse_pattern(pattern), sparsity).weight, statistics)
            for method in (alps, sparsegpt)
        ]
        assert errors[0] < 0.9 * errors[1]


def test_projections_of_one_input_are_solved_as_each_would_be_alone(device):
    statistics = gathered(inputs(6, 80, 200, seed=2, dead=(1, 130)), device)
    generator = torch.Generator().manual_seed(3)
    targets = [
        Target(torch.randn(rows, 200, generator=generator).to(device), parse_pattern(pattern), sparsity, damping)
        for pattern, rows, sparsity, damping in [
            ("unstructured", 24, 0.5, 0.01),
            ("2:4", 9, 0.5, 0.1),
            ("unstructured", 17, 0.0, 0.01),
            ("unstructured", 5, 0.7, 0.1),
        ]
    ]
    together = alps.prune_together(targets, statistics)
    for target, solution in zip(targets, together, strict=True):
        (alone,) = alps.prune_together([target], statistics)
        assert torch.equal(solution.mask, alone.mask)
        assert torch.equal(solution.weight, alone.weight)
        assert solution.damping == target.damping
    assert torch.equal(together[2].mask, torch.zeros_like(together[2].mask))


def test_a_matrix_of_no_inputs_is_an_error():
    statistics = InputStatistics("gram", torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 1)
    with pytest.raises(SolverError, match="not positive definite with damping 0.01"):
        alps.prune(torch.ones(3, 2), statistics, parse_pattern("unstructured"), 0.5)


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_a_refit_mask_has_the_least_squares_of_each_row(method, pattern, dead, device):
    if method == "wanda-variant" and pattern != "unstructured":
        pytest.skip("it has no N:M")
    weight = torch.randn(20, 160, generator=torch.Generator().manual_seed(1))
    x = inputs(6, 80, 160, seed=1, dead=dead)
    statistics = gathered(x, device)
    targets = [Target(weight.to(device), parse_pattern(pattern), 0.5, refit=True)]
    (before,) = METHODS[method].solve(targets, statistics)
    (after,) = refit(iter([before]), targets, statistics, steps=100)
    assert torch.equal(after.mask, before.mask)
    assert not after.weight[after.mask].any()
    live = [place for place in range(160) if place not in dead]
    dense = weight.clone()
    dense[:, list(dead)] = 0
    expected = least_squares(dense, damped(x), after.mask.cpu())
    assert relative(after.weight[:, live], expected[:, live].float()) < 1e-4
    assert torch.allclose(after.weight[:, list(dead)], before.weight[:, list(dead)], rtol=1e-6)


def test_the_steps_of_a_refit_go_nearly_all_the_way(device):
    weight = torch.randn(20, 160, generator=torch.Generator().manual_seed(1)).to(device)
    statistics = gathered(inputs(6, 80, 160, seed=1), device)
    targets = [Target(weight, parse_pattern("unstructured"), 0.7, refit=True)]

    def lost(steps: int) -> float:
        (found,) = refit(METHODS["wanda"].solve(targets, statistics), targets, statistics, steps)
        assert found.refit_steps == steps
        return output_error(weight, found.weight, statistics)

    least, given, none = lost(100), lost(REFIT_STEPS), lost(0)
    assert least < 0.8 * none
    assert given == pytest.approx(least, rel=1e-3)


def test_rows_that_are_done_stay_where_they_are():
    statistics = gathered(inputs(6, 80, 32, seed=1))
    unit = UnitGram.of(statistics, 0.01)
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    dense = unit.scaled(weight)
    fixed = torch.zeros_like(dense, dtype=torch.bool)
    fixed[3] = True
    found = descend(dense.clone(), product(dense, unit.matrix), fixed, unit, 50)
    assert torch.allclose(found, dense, rtol=1e-4, atol=1e-5)
    assert not found[2].any()
    assert torch.equal(found[3], dense[3])


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_more_steps_do_no_harm_where_fewer_tokens_than_inputs_are_not_damped(tokens, device):
    """Rounding makes some of the Gram matrix's zero eigenvalues negative: down these a step has no end."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, tokens, 512, generator=generator), torch.randn(48, 512, generator=generator)
    fixed = (torch.rand(weight.shape, generator=generator) < 0.5).to(device)
    statistics, weight, x = gathered(x, device), weight.to(device), x[0].to(device)
    unit = UnitGram.of(statistics, 0.0)
    dense = unit.scaled(weight)
    found = descend(dense.masked_fill(fixed, 0), product(dense, unit.matrix), fixed, unit, 200)
    assert relative((found / unit.norms) @ x.T, weight @ x.T) < 1e-3
    assert found.abs().max() < 10 * dense.abs().max()
