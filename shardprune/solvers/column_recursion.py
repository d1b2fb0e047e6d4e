"""SparseGPT's steps over the columns of one block as a recursion of matrix products: on every processor.

A block is halved recursively: the left half is finished first, then one matrix product corrects the right half for
everything that the left half lost. Few columns get many small updates this way; nearly all arithmetic is in products.
"""

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
        lost = torch.empty_like(self.stack.columns[left:right])
        self._over_units(left, right, lost)
        self.stack.squares.add_(torch.mv(lost.square().t(), self._inverse[left:right]))
        return lost

    def _over_units(self, left: int, right: int, lost: Tensor) -> None:
        unit = self.stack.unit
        units = -(-(right - left) // unit)
        if units == 1:
            self._choose(left, right)
            self._over_columns(left, right, lost, self.stack.mask[left:right].to(lost.dtype))
        else:
            size = units // 2 * unit
            self._over_units(left, left + size, lost[:size])
            self._correct(left, left + size, right, lost[:size])
            self._over_units(left + size, right, lost[size:])

    def _over_columns(self, left: int, right: int, lost: Tensor, chosen: Tensor) -> None:
        """Prune the columns [left, right); `chosen` [right - left, rows] is 1 at pruned weights, else 0."""
        if right - left == 1:
            column = self.stack.columns[left]
            torch.mul(column, chosen[0], out=lost[0])
            column.sub_(lost[0])  # exactly zero where pruned, unchanged elsewhere
        else:
            half = (right - left) // 2
            self._over_columns(left, left + half, lost[:half], chosen[:half])
            self._correct(left, left + half, right, lost[:half])
            self._over_columns(left + half, right, lost[half:], chosen[half:])

    def _correct(self, left: int, middle: int, right: int, lost: Tensor) -> None:
        """Correct the columns [middle, right) for what [left, middle) lost."""
        steps = self.factor.steps[left:middle, middle:right]
        add_product(self.stack.columns[middle:right], steps.t(), lost, alpha=-1)

    def _choose(self, left: int, right: int) -> None:
        """Choose the zeros of one unit by w^2 / u_jj^2 (equation 3), on the weights as corrected so far."""
        stack = self.stack
        scores = (stack.columns[left:right] / self.factor.diagonal[left:right].unsqueeze(1)).square_()
        if isinstance(stack.pattern, NM):
            stack.mask[left:right] = stack.pattern.mask(scores.t(), stack.pattern.sparsity, per_row=True).t()
            return
        for span, count in zip(stack.spans, stack.counts(left, right), strict=True):
            stack.mask[left:right, span] = smallest(scores[:, span], count)
