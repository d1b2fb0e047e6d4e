"""SparseGPT's steps over the columns of one block by matrix products: on every processor.

A block is halved recursively: the left half is finished first, then one matrix product corrects the right half for
everything that the left half lost. Few columns get many small updates this way; nearly all arithmetic is in products.
"""

from functools import cache

import torch
from torch import Tensor

from shardprune.solvers.factor import Factor
from shardprune.solvers.pattern import NM
from shardprune.solvers.products import add_product
from shardprune.solvers.selection import smallest
from shardprune.solvers.stack import Stack


class ColumnRecursion:
    """The steps over the columns of a stack, block by block."""

    def __init__(self, stack: Stack, factor: Factor) -> None:
        self.stack, self.factor = stack, factor
        self._inverse = factor.diagonal.square().reciprocal_()  # 1 / u_jj^2

    def prune_block(self, left: int, right: int) -> Tensor:
        """Prune the columns [left, right), whole units; return the weights that they lose, [right - left, rows]."""
        columns, steps = self.stack.columns[left:right], self.factor.steps[left:right, left:right].t()
        lost = torch.empty_like(columns)
        unit = self.stack.unit
        units = [slice(start, min(start + unit, right - left)) for start in range(0, right - left, unit)]
        for own, correction in zip(units, _corrections(len(units)), strict=True):
            self._choose(left + own.start, left + own.stop)
            chosen = self.stack.mask[left:right][own].to(lost.dtype)
            _prune_columns(columns[own], steps[own, own], lost[own], chosen)
            if correction:
                first, middle, last = correction
                done, rest = slice(unit * first, unit * middle), slice(unit * middle, unit * last)
                add_product(columns[rest], steps[rest, done], lost[done], alpha=-1)
        self.stack.squares.add_(torch.mv(lost.square().t(), self._inverse[left:right]))
        return lost

    def _choose(self, left: int, right: int) -> None:
        """Choose the zeros of one unit by w^2 / u_jj^2 (equation 3), on the weights as corrected so far."""
        stack = self.stack
        scores = (stack.columns[left:right] / self.factor.diagonal[left:right].unsqueeze(1)).square_()
        if isinstance(stack.pattern, NM):
            stack.mask[left:right] = stack.pattern.mask(scores.t(), stack.pattern.sparsity, per_row=True).t()
            return
        for span, count in zip(stack.spans, stack.counts(left, right), strict=True):
            stack.mask[left:right, span] = smallest(scores[:, span], count)


def _prune_columns(columns: Tensor, steps: Tensor, lost: Tensor, chosen: Tensor) -> None:
    """Prune columns [width, rows] in place, and fill `lost`, likewise.

    Args:
        steps: u_ij / u_ii of column j to be corrected for column i, [j, i].
        chosen: 1 at pruned weights, else 0, [width, rows].
    """
    rows = zip(columns.unbind(), lost.unbind(), chosen.unbind(), _corrections(len(columns)), strict=True)
    for column, gone, zeros, correction in rows:
        torch.mul(column, zeros, out=gone)
        column.sub_(gone)  # exactly zero where pruned, unchanged elsewhere
        if correction:
            first, middle, last = correction
            add_product(columns[middle:last], steps[middle:last, first:middle], lost[first:middle], alpha=-1)


@cache
def _corrections(count: int) -> tuple[tuple[int, int, int] | None, ...]:
    """Return the correction that is due after each of `count` places in turn: (first, middle, last), by which what
    [first, middle) has lost corrects [middle, last); None after the last place.
    """

    def within(first: int, last: int) -> list[tuple[int, int, int]]:
        if last - first == 1:
            return []
        middle = first + (last - first) // 2
        return [*within(first, middle), (first, middle, last), *within(middle, last)]

    return (*within(0, count), None)
