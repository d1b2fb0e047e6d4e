import pytest
import torch

from shardprune.solvers import selection
from shardprune.solvers.pattern import NM, Mixed, Unstructured, parse_pattern, pattern_of
from shardprune.solvers.selection import cumulative_counts, smallest, smallest_per_group, smallest_per_row


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


def test_mixed_patterns_get_their_n_from_the_sparsity():
    mixed = parse_pattern("mixed:8")
    assert mixed == Mixed(8)
    assert mixed.sparsity is None
    assert [mixed.at(1 - n / 8) for n in (1, 3, 8)] == [NM(1, 8), NM(3, 8), NM(8, 8)]
    assert not NM(8, 8).mask(torch.rand(4, 16), 0.0, per_row=True).any()
    assert NM(2, 4).at(0.9) == NM(2, 4)


@pytest.mark.parametrize("text", ["mixed:1", "mixed:0", "mixed", "mixed:", "mixed:2:4"])
def test_a_mixed_pattern_that_is_none_is_an_error(text):
    with pytest.raises(ValueError, match="mixed:M"):
        parse_pattern(text)


@pytest.mark.parametrize("text", ["1:2", "2:4", "1:4", "3:4", "2:6", "1:3", "2:8", "4:8", "5:8", "3:16", "20:32"])
@pytest.mark.parametrize("cols", [96, 480])
def test_the_pattern_of_a_pruned_weight_is_found(text, cols):
    pattern = parse_pattern(text)
    scores = torch.rand(200, cols, generator=torch.Generator().manual_seed(cols))
    weight = torch.ones(200, cols).masked_fill(pattern.mask(scores, 0.5, per_row=True), 0)
    assert pattern_of(weight) == pattern


def test_columns_that_all_rows_prune_do_not_hide_the_pattern():
    """Wanda's masks are alike in all rows: other groups may happen to have even fewer nonzeros."""
    scores = torch.rand(64, 1, generator=torch.Generator().manual_seed(0)) + torch.arange(32) % 7 / 7
    weight = torch.ones(64, 32).masked_fill(NM(1, 8).mask(scores, 0.5, per_row=True), 0)
    assert NM(1, 9).holds(weight)
    assert pattern_of(weight) == NM(1, 8)


@pytest.mark.parametrize("dead", [0.05, 0.2, 0.5])
def test_zeros_beyond_the_pattern_do_not_hide_it(dead):
    """Dead inputs and rows leave fewer nonzeros than N:M allows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.ones(300, 128).masked_fill(NM(2, 4).mask(torch.rand(300, 128, generator=generator), 0.5, True), 0)
    weight[:, torch.rand(128, generator=generator) < dead / 2] = 0
    weight[torch.rand(300, generator=generator) < dead / 2] = 0
    assert pattern_of(weight) == NM(2, 4)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5, 0.9, 0.97, 0.99])
@pytest.mark.parametrize("shape", [(32, 48), (400, 256)])
def test_zeros_anywhere_are_not_taken_for_groups(shape, sparsity):
    for seed in range(10):
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        weight = torch.ones(shape).masked_fill(Unstructured().mask(scores, sparsity, per_row=False), 0)
        assert pattern_of(weight) == Unstructured()


@pytest.mark.parametrize("seed", range(6))
def test_zeros_that_gather_in_columns_are_not_taken_for_groups(seed):
    """As in Wanda's masks, where the counts of groups differ less than if zeros were anywhere."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(256, 128, generator=generator) + 2 * torch.rand(128, generator=generator)
    weight = torch.ones(256, 128).masked_fill(Unstructured().mask(scores, 0.5, per_row=True), 0)
    assert any(NM(m - 1, m).holds(weight) for m in (8, 32))
    assert pattern_of(weight) == Unstructured()


@pytest.mark.parametrize(
    "weight", [torch.ones(8, 64), torch.zeros(8, 64), torch.ones(4, 1)], ids=["ones", "zeros", "thin"]
)
def test_weights_without_a_pattern(weight):
    assert pattern_of(weight) == Unstructured()


@pytest.mark.parametrize("at_once", [1, 7, 20, 1000])
def test_rows_that_are_sorted_apart_give_one_mask(monkeypatch, at_once):
    scores = torch.randint(0, 5, (9, 10), generator=torch.Generator().manual_seed(0)).float()  # half full of ties
    counts = torch.arange(9)
    whole, groups = smallest_per_row(scores, counts), smallest_per_group(scores, 2, 4)
    monkeypatch.setattr(selection, "SORTED", at_once)
    assert torch.equal(smallest_per_row(scores, counts), whole)
    assert torch.equal(smallest_per_group(scores, 2, 4), groups)
