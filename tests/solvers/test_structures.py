import pytest
import torch

from shardprune.errors import SolverError
from shardprune.solvers import structures
from shardprune.solvers.factor import factorise
from shardprune.solvers.outliers import outlier_ratios
from shardprune.solvers.statistics import InputStatistics, output_error
from shardprune.solvers.structures import (
    Owned,
    columns_of,
    correct,
    head_contributions,
    keep_by_error,
    keep_largest,
    mean_metric,
    neuron_activity,
    outlier_shares,
    removal_errors,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(cols: int, seed: int, tokens: int = 80, dead: tuple[int, ...] = ()) -> torch.Tensor:
    """Correlated inputs [6, tokens, cols] of very different scales, some always zero."""
    mixing = normal(cols, cols, seed=seed) * 0.3 + torch.eye(cols)
    drawn = normal(6, tokens, cols, seed=seed + 1) @ mixing * normal(cols, seed=seed + 2).exp()
    drawn[..., list(dead)] = 0
    return drawn


def gathered(x: torch.Tensor, device: str = "cpu") -> InputStatistics:
    statistics = InputStatistics.empty("gram", x.shape[-1], device)
    statistics.add(x.to(device), len(x))
    return statistics


def damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    dead = h.diagonal() == 0
    h = h + torch.diag(dead.to(h.dtype))
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def plain_hessian(x: torch.Tensor) -> torch.Tensor:
    tokens = x.double().reshape(-1, x.shape[-1])
    return 2 / len(x) * tokens.T @ tokens


def plain_columns(chosen: list[int], size: int) -> list[int]:
    return [k * size + j for k in chosen for j in range(size)]


def least_error(weight: torch.Tensor, hessian: torch.Tensor, removed: list[int]) -> float:
    """The least tr(D H D^T) of all changes D that zero the columns `removed`, from normal equations in float64."""
    kept = [j for j in range(len(hessian)) if j not in removed]
    change = -weight.double()
    cross = weight.double()[:, removed] @ hessian[removed][:, kept]
    change[:, kept] = torch.linalg.solve(hessian[kept][:, kept], cross.T).T
    return float(torch.trace(change @ hessian @ change.T))


def plain_greedy(weight: torch.Tensor, hessian: torch.Tensor, size: int, count: int) -> list[int]:
    """One structure after the other, each time the one that leaves the least error, the last of equal ones."""
    kept = list(range(len(hessian) // size))
    while len(kept) > count:
        gone = [k for k in range(len(hessian) // size) if k not in kept]
        errors = {k: least_error(weight, hessian, plain_columns([*gone, k], size)) for k in kept}
        kept.remove(min(kept, key=lambda k: (errors[k], -k)))
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4, 12])
def test_head_contributions_are_the_norms_of_each_heads_output(size, dtype, device, monkeypatch):
    monkeypatch.setattr(structures, "OUTPUTS", 150)  # two heads at once on CUDA
    x, weight = normal(2, 5, 24).to(dtype), normal(7, 24, seed=1).to(dtype)
    expected = torch.zeros(24 // size, dtype=torch.float64)
    for token in x.double().reshape(-1, 24):
        for k in range(24 // size):
            expected[k] += (
                (weight.double()[:, k * size : (k + 1) * size] @ token[k * size : (k + 1) * size]).abs().sum()
            )
    found = head_contributions(x.to(device), weight.to(device), size)
    assert found.dtype == torch.float32
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-5)


def test_neuron_activity_is_summed_in_float32(device):
    x = (normal(4, 700, 9) + 3).bfloat16()
    expected = sum(token.abs() for token in x.double().reshape(-1, 9))
    found = neuron_activity(x.to(device))
    assert found.dtype == torch.float32
    assert torch.allclose(found.cpu().double(), expected, rtol=1e-5)


@pytest.mark.parametrize("block", [1, 100, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlier_shares_are_those_of_the_entries_that_a_structure_owns(dtype, block, device, monkeypatch):
    monkeypatch.setattr(structures, "BLOCK", block)
    groups = torch.arange(4)
    owners = {  # fused rows: queries, then keys, then rows of no group
        "qkv": (0, torch.cat([groups.repeat_interleave(6), groups.repeat_interleave(3), torch.full((5,), -1)])),
        "o": (1, groups.repeat_interleave(6)),
    }
    shapes = {"qkv": (41, 20), "o": (20, 24)}
    weights = {name: normal(*shape).to(dtype) for name, shape in shapes.items()}
    squares = {name: normal(shape[1], seed=1).exp() ** 2 for name, shape in shapes.items()}
    squares["o"][3] = 0

    metric = {name: weights[name].double().abs() * squares[name].double().sqrt() for name in shapes}
    everything = torch.cat([entries.flatten() for entries in metric.values()])
    threshold = 2 * float(everything.mean())
    own = [
        torch.cat([metric[name].transpose(0, dim)[of == k].flatten() for name, (dim, of) in owners.items()])
        for k in range(4)
    ]

    on_device = {name: (weights[name].to(device), squares[name].to(device)) for name in shapes}
    assert 2 * mean_metric(on_device.values()) == pytest.approx(threshold, rel=1e-12)
    owned = [Owned(*on_device[name], of.to(device), dim) for name, (dim, of) in owners.items()]
    shares, means = outlier_shares(owned, 4, threshold)
    assert shares.tolist() == pytest.approx(
        [float((entries > threshold).double().mean()) for entries in own], abs=1e-12
    )
    assert means.tolist() == pytest.approx([float(entries.mean()) for entries in own], rel=1e-6)
    assert shares.min() > 0


def test_shares_of_structures_that_own_everything_average_to_the_outlier_ratio():
    weight, squares = normal(12, 30), normal(30, seed=1).square()
    threshold = 3 * mean_metric([(weight, squares)])
    for dim, slices in ((0, 12), (1, 30)):
        shares, means = outlier_shares([Owned(weight, squares, torch.arange(slices) % 3, dim)], 3, threshold)
        assert 100 * float(shares.mean()) == pytest.approx(outlier_ratios({"w": (weight, squares)}, 3).layer)
        assert 3 * float(means.mean()) == pytest.approx(threshold)


def test_the_largest_stay_then_the_larger_ties_then_the_lower_index(device):
    scores = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0], device=device)
    ties = torch.tensor([0.5, 0.0, 0.7, 0.0, 0.7, 0.9], device=device)
    assert [keep_largest(scores, count).tolist() for count in range(7)] == [
        [], [3], [1, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
    assert [keep_largest(scores, count, ties).tolist() for count in range(2, 7)] == [
        [1, 3], [1, 3, 5], [1, 2, 3, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_keep_largest_agrees_with_a_sort_of_tuples(levels):
    generator = torch.Generator().manual_seed(levels)
    scores, ties = torch.randint(levels, (2, 300), generator=generator).double()
    for count in (0, 1, 150, 299, 300):
        order = sorted(range(300), key=lambda k: (-float(scores[k]), -float(ties[k]), k))
        found = keep_largest(scores, count, ties)
        assert found.tolist() == sorted(order[:count])
        assert found.dtype == torch.int64


@pytest.mark.parametrize("size", [1, 4, 8])
def test_removal_errors_are_the_least_that_any_correction_leaves(size, device):
    weight, hessian = normal(10, 24), damped(plain_hessian(inputs(24, seed=1)), 0.01)
    expected = [least_error(weight, hessian, plain_columns([k], size)) for k in range(24 // size)]
    found = removal_errors(weight.to(device), torch.linalg.inv(hessian).float().to(device), size)
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("structure_count", "size"), [(48, 1), (12, 4), (5, 9)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_keep_by_error_agrees_with_the_plain_greedy(structure_count, size, share, device):
    cols = structure_count * size
    dead = (0, 1, 2, 3, cols - 1)
    weight, x = normal(10, cols), inputs(cols, seed=size, dead=dead)
    count = round(share * structure_count)
    given = weight.to(device, copy=True)
    found = keep_by_error(given, gathered(x, device).factor(0.01), size, count)
    weightless = weight.clone()
    weightless[:, list(dead)] = 0
    assert found.tolist() == plain_greedy(weightless, damped(plain_hessian(x), 0.01), size, count)
    assert found.dtype == torch.int64
    assert torch.equal(given.cpu(), weight)


def test_structures_whose_inputs_are_always_zero_go_first_the_higher_index_before_the_lower():
    factor = gathered(inputs(24, seed=1, dead=(2, 3, 8, 9, 20, 21))).factor(0.01)
    weight = normal(10, 24) * torch.where(torch.isin(torch.arange(24), torch.tensor([2, 3, 8, 9])), 100, 1)
    assert keep_by_error(weight, factor, 2, 10).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 11]
    assert keep_by_error(weight, factor, 2, 9).tolist() == [0, 2, 3, 5, 6, 7, 8, 9, 11]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_batches_choose_about_as_well_as_one_at_a_time(size, share, device, monkeypatch):
    weight = normal(40, 400 * size)  # four noisy copies of every input
    x = normal(6, 400, 100 * size, seed=1).repeat(1, 1, 4) + 0.3 * normal(6, 400, 400 * size, seed=2)
    hessian, statistics = plain_hessian(x), gathered(x, device)
    count = round(400 * share)

    def error(kept: torch.Tensor) -> float:
        removed = sorted(set(range(400 * size)) - set(columns_of(kept, size).tolist()))
        return least_error(weight, damped(hessian, 0.01), removed)

    batched = error(keep_by_error(weight.to(device), statistics.factor(0.01), size, count))
    monkeypatch.setattr(structures, "BATCHES", 400)
    single = error(keep_by_error(weight.to(device), statistics.factor(0.01), size, count))
    by_norm = error(keep_largest((weight.square().sum(0) * hessian.diagonal()).view(-1, size).sum(1), count))
    assert batched < 1.1 * single
    assert batched < 0.75 * by_norm


def test_a_copy_of_another_neuron_is_free_to_go():
    x, weight = inputs(32, seed=1), normal(16, 32)
    x[..., 7] = 2 * x[..., 19]
    kept = keep_by_error(weight, gathered(x).factor(1e-4), 1, 31).tolist()
    assert (7 in kept) != (19 in kept)


def test_an_inverse_that_is_not_positive_definite_is_an_error():
    with pytest.raises(SolverError, match="not positive definite"):
        removal_errors(torch.ones(2, 4), torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0])), 2)


@pytest.mark.parametrize(("cols", "size"), [(30, 1), (48, 6), (300, 1), (320, 32)])
@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_correction_solves_the_normal_equations(cols, size, damping, device):
    weight, x = normal(12, cols), inputs(cols, seed=cols, tokens=100)
    chosen = torch.randperm(cols // size, generator=torch.Generator().manual_seed(0))[: cols // size // 2].sort().values
    kept, hessian = columns_of(chosen, size), plain_hessian(x)
    assert kept.tolist() == plain_columns(chosen.tolist(), size)
    removed = [j for j in range(cols) if j not in set(kept.tolist())]
    cross = weight.double()[:, removed] @ hessian[removed][:, kept]
    change = torch.linalg.solve(damped(hessian[kept][:, kept], damping), cross.T).T

    statistics, given = gathered(x, device), weight.to(device, copy=True)
    sums = statistics.sums.tril()
    found = correct(given, statistics, kept.to(device), damping)
    assert (found.damping, found.retries) == (damping, 0)
    assert float((found.weight.cpu() - weight[:, kept] - change).norm() / change.norm()) < 1e-3
    assert torch.equal(given.cpu(), weight)
    assert torch.equal(statistics.sums.tril(), sums)


@pytest.mark.parametrize("size", [1, 6])
def test_correction_lowers_the_output_error_to_about_that_of_least_squares(size, device):
    weight, x = normal(20, 96), inputs(96, seed=1, tokens=200)
    kept = columns_of(torch.arange(0, 96 // size, 2), size)
    tokens = x.double().reshape(-1, 96)
    outputs = tokens @ weight.double().T
    best = torch.linalg.lstsq(tokens[:, kept], outputs).solution
    floor = float((tokens[:, kept] @ best - outputs).square().sum() / outputs.square().sum())

    def error(columns: torch.Tensor) -> float:
        pruned = torch.zeros(20, 96, device=device)
        pruned[:, kept.to(device)] = columns.to(device)
        return output_error(weight.to(device), pruned, gathered(x, device))

    exact = error(correct(weight.to(device), gathered(x, device), kept.to(device), 1e-5).weight)
    corrected = error(correct(weight.to(device), gathered(x, device), kept.to(device)).weight)
    assert floor * 0.999 < exact < 1.01 * floor
    assert exact < corrected < 0.7 * error(weight[:, kept])


@pytest.mark.parametrize("kept", [range(32), range(0, 32, 2)])
def test_dead_inputs_that_stay_are_not_corrected_and_those_that_go_are_not_missed(kept, device):
    dead = (0, 1, 8, 31)
    weight, x, kept = normal(6, 32), inputs(32, seed=1, dead=dead), torch.tensor(list(kept))
    found = correct(weight.to(device), gathered(x, device), kept.to(device)).weight.cpu()
    still = torch.isin(kept, torch.tensor(dead))
    assert torch.equal(found[:, still], weight[:, kept][:, still])
    other = weight.clone()
    other[:, [1, 31]] = 100
    assert torch.allclose(correct(other, gathered(x), kept).weight[:, ~still], found[:, ~still], atol=1e-5)


def test_nothing_removed_leaves_the_weight_as_it_is(device):
    weight, statistics = normal(6, 32).to(device), gathered(inputs(32, seed=1), device)
    found = correct(weight, statistics, torch.arange(32, device=device))
    assert torch.equal(found.weight, weight)
    assert found.weight is not weight
    assert (found.damping, found.retries) == (0.01, 0)


def test_retries_of_the_factorisation_are_reported():
    statistics = InputStatistics("gram", 2 * torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -0.5, 1])), samples=4)
    kept = torch.arange(8)
    plain = factorise(statistics.hessian[:8, :8].clone(), 0.01)
    found = correct(torch.ones(3, 9), statistics, kept)
    assert (found.damping, found.retries) == (plain.damping, plain.retries) == (1.0, 2)


def test_activations_that_overflow_are_an_error():
    statistics = gathered(inputs(8, seed=1))
    statistics.sums[2, 2] = float("inf")
    with pytest.raises(SolverError, match="not finite"):
        correct(normal(3, 8), statistics, torch.arange(6))
