import pytest
import torch

from shardprune.solvers.pattern import NM, Unstructured, parse_pattern
from shardprune.solvers.selection import cumulative_counts, smallest, smallest_per_row


@pytest.mark.parametrize("count", [0, 1, 5, 39, 40])
def test_smallest_takes_exactly_as_many_even_among_ties(count):
    scores = torch.randint(0, 4, (5, 8), generator=torch.Generator().manual_seed(count)).float()
    expected = torch.zeros(40, dtype=torch.bool)
    expected[scores.flatten().argsort(stable=True)[:count]] = True
    assert torch.equal(smallest(scores, count), expected.view(5, 8))


def test_smallest_per_row_takes_each_rows_own_count():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [5.0, 4.0, 6.0]])
    mask = smallest_per_row(scores, torch.tensor([1, 2, 0]))
    assert mask.tolist() == [[False, True, False], [True, True, False], [False, False, False]]


def test_cumulative_counts_add_up():
    counts = cumulative_counts(parts=192, size=192, fraction=0.7)
    assert int(counts.sum()) == int(0.7 * 192 * 192 + 0.5)
    assert set(counts.tolist()) == {134, 135}


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2:4:8", "half", "2-4", ""])
def test_a_pattern_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="N:M"):
        parse_pattern(text)


def test_patterns():
    assert parse_pattern("unstructured") == Unstructured()
    assert parse_pattern("2:8") == NM(2, 8)
    assert NM(2, 8).sparsity == 0.75
    assert NM(2, 4).holds(torch.tensor([[1.0, 0, 0, 1, 1]]))
    assert not NM(2, 4).holds(torch.tensor([[1.0, 0, 1, 1, 0]]))


def test_a_short_last_group_keeps_at_most_n():
    mask = NM(2, 4).mask(torch.tensor([[4.0, 3, 2, 1, 9, 8, 7]]), 0.5, per_row=True)
    assert mask.tolist() == [[False, False, True, True, False, False, True]]
    assert NM(2, 4).zeros(1, 7, 0.5) == 3
    assert NM(2, 4).zeros(1, 6, 0.5) == 2
