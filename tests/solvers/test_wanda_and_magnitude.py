import pytest
import torch

from shardprune.solvers import magnitude, wanda
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics


def gathered(x: torch.Tensor, kind: str, device: str) -> InputStatistics:
    statistics = InputStatistics.empty(kind, x.shape[-1], device)
    for wave in x.to(device).split(3):
        statistics.add(wave, len(wave))
    return statistics


def plain_mask(scores: torch.Tensor, pattern: str, sparsity: float, per_row: bool) -> torch.Tensor:
    """Masks by sorting, one comparison group after another."""
    rows, cols = scores.shape
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if pattern != "unstructured":
        n, m = (int(part) for part in pattern.split(":"))
        for row in range(rows):
            for start in range(0, cols, m):
                group = scores[row, start : start + m]
                mask[row, start + group.argsort(stable=True)[: max(0, len(group) - n)]] = True
    elif per_row:
        for row in range(rows):
            count = int(sparsity * cols * (row + 1) + 0.5) - int(sparsity * cols * row + 0.5)
            mask[row, scores[row].argsort(stable=True)[:count]] = True
    else:
        flat = scores.flatten().argsort(stable=True)[: int(sparsity * rows * cols + 0.5)]
        mask.view(-1)[flat] = True
    return mask


CASES = [
    ("unstructured", 0.5),
    ("unstructured", 0.7),
    ("unstructured", 0.0),
    ("2:4", 0.5),
    ("3:5", 0.4),
    ("1:8", 0.875),
]


@pytest.mark.parametrize("kind", ["gram", "squares"])
@pytest.mark.parametrize(("rows", "cols"), [(24, 64), (40, 200), (7, 131)])
@pytest.mark.parametrize(("pattern", "sparsity"), CASES)
def test_wanda_agrees_with_the_plain_formulation(rows, cols, pattern, sparsity, kind, device):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, cols, generator=generator)
    x = torch.randn(6, 30, cols, generator=generator) * torch.rand(cols, generator=generator)
    x[..., 5] = 0  # a dead input: its weights cost nothing
    norms = (x.double().reshape(-1, cols) ** 2).sum(0) / len(x)
    mask = plain_mask(weight.double().abs() * norms.sqrt(), pattern, sparsity, per_row=True)
    solution = wanda.prune(weight.to(device), gathered(x, kind, device), parse_pattern(pattern), sparsity)
    assert torch.equal(solution.mask.cpu(), mask)
    assert torch.equal(solution.weight.cpu(), weight.masked_fill(mask, 0))
    assert int(mask.sum()) == parse_pattern(pattern).zeros(rows, cols, sparsity)


@pytest.mark.parametrize(("rows", "cols"), [(24, 64), (7, 131)])
@pytest.mark.parametrize(("pattern", "sparsity"), CASES)
def test_magnitude_agrees_with_the_plain_formulation(rows, cols, pattern, sparsity, device):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(cols))
    mask = plain_mask(weight.abs(), pattern, sparsity, per_row=False)
    solution = magnitude.prune(weight.to(device), None, parse_pattern(pattern), sparsity)
    assert torch.equal(solution.mask.cpu(), mask)
    assert torch.equal(solution.weight.cpu(), weight.masked_fill(mask, 0))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.97])
def test_the_variant_is_one_alpha_for_all_rows(sparsity, device):
    """As the authors' code has it: halve an interval of alpha until the sparsity is met."""
    rows, cols = 24, 64
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    x = torch.randn(6, 30, cols, generator=generator) * torch.rand(cols, generator=generator)
    metric = weight.double().abs() * ((x.double().reshape(-1, cols) ** 2).sum(0) / len(x)).sqrt()
    wanted = int(sparsity * rows * cols + 0.5)

    def masked(alpha: float) -> torch.Tensor:
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        for row in range(rows):
            order = metric[row].argsort(stable=True)
            going = metric[row][order].cumsum(0) <= alpha * metric[row].sum()
            mask[row, order[going]] = True
        return mask

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if int(masked(middle).sum()) <= wanted else (low, middle)
    expected = masked(low)
    assert int(expected.sum()) == wanted

    solution = wanda.prune_variant(
        weight.to(device), gathered(x, "squares", device), parse_pattern("unstructured"), sparsity
    )
    assert torch.equal(solution.mask.cpu(), expected)
    assert torch.equal(solution.weight.cpu(), weight.masked_fill(expected, 0))
    if 0 < sparsity < 0.97:
        assert len(set(expected.sum(1).tolist())) > 3  # rows differ, which plain Wanda's do not


def test_a_row_without_inputs_goes_first():
    weight = torch.ones(2, 4)
    weight[0] = 0
    statistics = InputStatistics("squares", torch.ones(4), 1)
    mask = wanda.prune_variant(weight, statistics, parse_pattern("unstructured"), 0.5).mask
    assert mask.tolist() == [[True] * 4, [False] * 4]
