"""Rebuilt masks against a loop over rows and pairs."""

import math

import pytest
import torch

from shardprune.solvers import barber
from shardprune.solvers.barber import Masked, rebuild, scores
from shardprune.solvers.pattern import NM, Unstructured


def plain_pairs(scores, mask, positions):
    """The pairs among some positions, in order: (gain, pruned position, kept position)."""
    pruned = sorted((p for p in positions if mask[p]), key=lambda p: -scores[p])
    kept = sorted((p for p in positions if not mask[p]), key=lambda p: scores[p])
    return [(scores[p] - scores[k], p, k) for p, k in zip(pruned, kept) if scores[p] > scores[k]]  # noqa: B905


def plain_rebuild(block, granularity, threshold):
    """Every unit's pairs, its groups' pairs together, the first fraction swapped."""
    values, masks, groups, units = {}, {}, {}, {}
    for index, piece in enumerate(block):
        rows, cols = piece.scores.shape
        for row in range(rows):
            for col in range(cols):
                place = (index, row, col)
                values[place], masks[place] = float(piece.scores[row, col]), bool(piece.mask[row, col])
                grouped = isinstance(piece.pattern, NM)
                line = col // piece.pattern.m if grouped else col
                unit = {"row": (index, row), "column": (index, line), "projection": index, "block": grouped}[
                    granularity
                ]
                group = (index, row, line) if grouped else unit
                units[place] = unit
                groups.setdefault((unit, group), []).append(place)
    pairs: dict = {}
    for (unit, _), positions in groups.items():
        pairs.setdefault(unit, []).extend(plain_pairs(values, masks, positions))
    swaps = 0
    for found in pairs.values():
        found.sort(key=lambda pair: -pair[0])
        for _, pruned, kept in found[: math.floor(threshold * len(found) + 1e-9)]:
            masks[pruned], masks[kept] = False, True
            swaps += 1
    new = [torch.zeros_like(piece.mask) for piece in block]
    for (index, row, col), masked in masks.items():
        new[index][row, col] = masked
    return new, swaps


def some_block(pattern, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for rows, cols in ((12, 24), (5, 24), (24, 9)):
        values = torch.rand(rows, cols, generator=generator)
        other = torch.rand(rows, cols, generator=generator)
        mask = pattern.mask(other, 0.6, per_row=False)
        pieces.append(Masked(values.to(device), mask.to(device), pattern))
    return pieces


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("granularity", ["row", "column", "projection", "block"])
@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), NM(1, 4), NM(3, 8), NM(5, 8)], ids=str)
def test_masks_are_those_of_the_loop_over_pairs(pattern, granularity, threshold, device, monkeypatch):
    monkeypatch.setattr(barber, "LINES", 50)  # several rows at a time, several times
    block = some_block(pattern, device)
    expected, swaps = plain_rebuild(
        [Masked(p.scores.cpu(), p.mask.cpu(), p.pattern) for p in block], granularity, threshold
    )
    found, count = rebuild(block, granularity, threshold)
    assert count == swaps
    assert (swaps > 0) == (threshold > 0)
    for piece, mask, wanted in zip(block, found, expected, strict=True):
        assert torch.equal(mask.cpu(), wanted)
        assert pattern.holds(torch.ones_like(piece.scores).masked_fill(mask, 0))
        if granularity != "block":
            assert int(mask.sum()) == int(piece.mask.sum())
    assert sum(int(mask.sum()) for mask in found) == sum(int(piece.mask.sum()) for piece in block)


@pytest.mark.parametrize("granularity", ["row", "column", "projection", "block"])
def test_ties_are_no_gain(granularity):
    """Scores of few distinct values: the number of swaps is that of strictly better pairs."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 4, (8, 10), generator=generator).float()
        mask = torch.rand(8, 10, generator=generator) < 0.5
        block = [Masked(values, mask, Unstructured())]
        _, expected = plain_rebuild(block, granularity, 1.0)
        (found,), swaps = rebuild(block, granularity, 1.0)
        assert swaps == expected
        assert int((found & ~mask).sum()) == swaps == int((mask & ~found).sum())
        assert float(values[~found].sum()) > float(values[~mask].sum())


@pytest.mark.parametrize("granularity", ["row", "projection"])
@pytest.mark.parametrize("mask", [torch.zeros(3, 8).bool(), torch.ones(3, 8).bool()], ids=["none", "all"])
def test_nothing_to_pair(mask, granularity):
    (found,), swaps = rebuild([Masked(torch.rand(3, 8), mask, Unstructured())], granularity, 1.0)
    assert swaps == 0
    assert torch.equal(found, mask)


def test_a_block_of_patterned_and_unpatterned_projections():
    block = [some_block(NM(2, 4))[0], some_block(Unstructured())[1]]
    expected, swaps = plain_rebuild(block, "block", 0.5)
    found, count = rebuild(block, "block", 0.5)
    assert count == swaps
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_fractions_are_of_decimals_not_of_their_binary_neighbours():
    """0.29 of 100 pairs are 29, though 0.29 * 100 is a hair below."""
    values = torch.cat([torch.full((100,), 2.0), torch.full((100,), 1.0)])[None]
    mask = torch.cat([torch.ones(100), torch.zeros(100)]).bool()[None]
    assert rebuild([Masked(values, mask, Unstructured())], "row", 0.29)[1] == 29


def test_what_is_zero_in_the_dense_weight_is_never_swapped_in():
    dense = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    mask = torch.tensor([[True, True, False, False]])
    found = scores("gradient", dense, torch.tensor([[9.0, 9.0, 1.0, 1.0]]), mask)
    assert torch.equal(found, torch.tensor([[-math.inf, 3.0, 1.0, 1.0]]))
    (new,), swaps = rebuild([Masked(found, mask, Unstructured())], "row", 1.0)
    assert (new.tolist(), swaps) == ([[True, False, True, False]], 1)


def test_metrics():
    dense, squares, mask = torch.tensor([[-2.0, 3.0]]), torch.tensor([[4.0, 9.0]]), torch.zeros(1, 2).bool()
    assert scores("weight", dense, None, mask).tolist() == [[2, 3]]
    assert scores("gradient", dense, squares, mask).tolist() == [[2, 3]]
    assert scores("weight-gradient", dense, squares, mask).tolist() == [[4, 9]]
