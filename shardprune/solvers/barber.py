"""LLM-Barber (Su et al., arXiv 2408.10631): rebuild a mask by swapping pruned weights with kept ones.

Every weight has a score, by default |w| * sqrt(g^2) with g the gradient of a block's output error. The
pruned weights in descending order are paired with the kept ones in ascending order; of the pairs whose
pruned weight has the larger score, the first fraction is swapped. Weights come and go in pairs, so that the
number of zeros is what it was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.rebuilding import Granularity, Metric
from shardprune.solvers.selection import kth_value, smallest, smallest_per_row

LINES = 2**24  # entries of the rows that are sorted at once


@dataclass(frozen=True)
class Masked:
    """One projection: `scores` [rows, cols] float32, `mask` [rows, cols] True where pruned, and its pattern."""

    scores: Tensor
    mask: Tensor
    pattern: Pattern


def scores(metric: Metric, dense: Tensor, squares: Tensor | None, mask: Tensor) -> Tensor:
    """Return the score of every weight, float32 [rows, cols].

    Args:
        dense: the weight before pruning.
        squares: the mean squared gradient; unused by the metric `weight`.
        mask: True where pruned. Weights that are zero in the dense model, too, are never swapped in.
    """
    if metric == "weight":
        found = dense.abs().float()
    else:
        assert squares is not None
        found = squares.sqrt() if metric == "gradient" else squares.sqrt() * dense.abs()
    return found.masked_fill(mask & (dense == 0), -math.inf)


def rebuild(block: Sequence[Masked], granularity: Granularity, threshold: float) -> tuple[list[Tensor], int]:
    """Return the new masks of a block's projections, and the number of swapped pairs.

    Pairs are formed within a row, a column, a projection or the whole block. N:M masks are rebuilt within their groups:
    there, the first fraction of the pairs of a row, a column (of groups), a projection or the block are those with the
    largest differences of scores, which is the order of pairs without groups, too.
    """
    masks = [masked.mask for masked in block]
    swaps = 0
    for part in _parts(block, granularity):
        pieces = [block[index] for index in part]
        grouped = isinstance(pieces[0].pattern, NM)
        if not grouped and granularity in ("row", "column"):
            found, count = _swap_in_lines(pieces[0], granularity, threshold)
        elif grouped:
            found, count = _swap_in_groups(pieces, granularity, threshold)
        else:
            found, count = _swap_over_all(pieces, threshold)
        swaps += count
        for index, mask in zip(part, found, strict=True):
            masks[index] = mask
    return masks, swaps


def _parts(block: Sequence[Masked], granularity: Granularity) -> list[list[int]]:
    """Return the projections whose weights are paired together: one each, or all of a block with N:M groups and all
    without.
    """
    if granularity != "block":
        return [[index] for index in range(len(block))]
    grouped = [index for index, masked in enumerate(block) if isinstance(masked.pattern, NM)]
    return [part for part in (grouped, [index for index in range(len(block)) if index not in grouped]) if part]


def _counts(pairs: Tensor, threshold: float) -> Tensor:
    """Return the fraction `threshold` of numbers of pairs, rounded down."""
    # 0.29 * 100 is 28.999999999999996 in floating point.
    return (pairs.double() * threshold + 1e-9).floor().to(torch.int64)


def _swap_over_all(pieces: Sequence[Masked], threshold: float) -> tuple[list[Tensor], int]:
    """Pair the weights of whole projections with each other.

    Without sorting: if P weights are pruned and v is the P-th smallest score, the pairs to swap are as many as pruned
    weights above v, or kept ones below it, whichever is more.
    """
    scores = torch.cat([piece.scores.reshape(-1) for piece in pieces])
    mask = torch.cat([piece.mask.reshape(-1) for piece in pieces])
    pruned = int(mask.sum())
    if not 0 < pruned < len(mask):
        return [piece.mask for piece in pieces], 0
    edge = kth_value(scores, pruned)
    pairs = torch.maximum((mask & (scores > edge)).sum(), (~mask & (scores < edge)).sum())
    swaps = int(_counts(pairs, threshold))
    revived = smallest(torch.where(mask, -scores, math.inf), swaps)
    removed = smallest(scores.masked_fill_(mask, math.inf), swaps)
    mask = mask ^ revived ^ removed
    parts = mask.split([piece.mask.numel() for piece in pieces])
    return [part.view_as(piece.mask) for part, piece in zip(parts, pieces, strict=True)], swaps


def _swap_in_lines(piece: Masked, granularity: Granularity, threshold: float) -> tuple[list[Tensor], int]:
    """Pair the weights of each row or column, many rows at once."""
    scores, mask = (piece.scores, piece.mask) if granularity == "row" else (piece.scores.t(), piece.mask.t())
    pairs = _Pairs.of(scores, mask, scores.shape[1])
    gains = pairs.gains.squeeze(1)  # in descending order
    counts = _counts((gains > 0).sum(dim=1), threshold)
    chosen = torch.arange(gains.shape[1], device=gains.device) < counts.unsqueeze(1)
    new = pairs.swapped(mask, chosen.unsqueeze(1))
    return [new if granularity == "row" else new.t()], int(counts.sum())


def _swap_in_groups(pieces: Sequence[Masked], granularity: Granularity, threshold: float) -> tuple[list[Tensor], int]:
    """Pair the weights of each group of an N:M pattern."""
    pairs = [_Pairs.of(piece.scores, piece.mask, _m(piece)) for piece in pieces]
    if granularity in ("row", "column"):
        gains = pairs[0].gains if granularity == "row" else pairs[0].gains.transpose(0, 1)
        lines = gains.flatten(1)
        counts = _counts((lines > 0).sum(dim=1), threshold)
        chosen = smallest_per_row(-lines, counts).view(gains.shape)
        chosen = chosen if granularity == "row" else chosen.transpose(0, 1)
        return [pairs[0].swapped(pieces[0].mask, chosen)], int(counts.sum())
    flat = torch.cat([pair.gains.reshape(-1) for pair in pairs])
    swaps = int(_counts((flat > 0).sum(), threshold))
    parts = smallest(-flat, swaps).split([pair.gains.numel() for pair in pairs])
    return [
        pair.swapped(piece.mask, part.view(pair.gains.shape))
        for pair, piece, part in zip(pairs, pieces, parts, strict=True)
    ], swaps


def _m(piece: Masked) -> int:
    assert isinstance(piece.pattern, NM)
    return piece.pattern.m


@dataclass(frozen=True)
class _Pairs:
    """The pairs of every group of `m` consecutive inputs of a row, best first.

    Attributes:
        gains: float32 [rows, groups, m // 2], the pruned weight's score minus the kept one's; -inf without a pair.
        revived, removed: int32, the pair's columns within the group.
    """

    gains: Tensor
    revived: Tensor
    removed: Tensor
    m: int

    @classmethod
    def of(cls, scores: Tensor, mask: Tensor, m: int) -> "_Pairs":
        parts = []
        most = m // 2  # both weights of a pair are in the group
        size = max(1, LINES // scores.shape[1])
        for some_scores, some_mask in zip(scores.split(size), mask.split(size), strict=True):
            pruned = cls._grouped(some_scores.masked_fill(~some_mask, -math.inf), m, -math.inf)
            kept = cls._grouped(some_scores.masked_fill(some_mask, math.inf), m, math.inf)
            high, revived = pruned.sort(dim=-1, descending=True, stable=True)
            low, removed = kept.sort(dim=-1, stable=True)
            parts.append((high[..., :most] - low[..., :most], revived[..., :most].int(), removed[..., :most].int()))
        gains, revived, removed = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return cls(gains, revived, removed, m)

    @staticmethod
    def _grouped(values: Tensor, m: int, padding: float) -> Tensor:
        rows, cols = values.shape
        return torch.nn.functional.pad(values, (0, -cols % m), value=padding).view(rows, -1, m)

    def swapped(self, mask: Tensor, chosen: Tensor) -> Tensor:
        """Return the mask with the chosen pairs swapped."""
        new = mask.clone()
        rows, groups, _ = chosen.nonzero(as_tuple=True)
        new[rows, groups * self.m + self.revived[chosen].long()] = False
        new[rows, groups * self.m + self.removed[chosen].long()] = True
        return new
