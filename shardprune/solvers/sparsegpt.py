"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column and correct the columns to the right.

From left to right, the columns to the right make up for the value that a pruned column j loses: with H^-1 = U^T U, w_k
-= w_j * (u_jk / u_jj) for every k > j (algorithm 1).

A column's correction has to reach a column to its right only before that column's turn. Columns are therefore taken in
blocks, and a block is halved recursively: the left half is finished first, then one matrix product corrects the right
half for everything that the left half lost. Few columns get many small updates this way; nearly all arithmetic is in
large products. The weights are kept transposed, [cols, rows], so that a column is contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.factor import Factor
from shardprune.solvers.methods import Solution
from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.products import add_product
from shardprune.solvers.selection import cumulative_counts, smallest
from shardprune.solvers.statistics import InputStatistics

DAMPING = 0.01
BLOCK = 128  # columns whose zeros are chosen together where the pattern is unstructured


def prune(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Prune `weight` [rows, cols] and correct what remains, from statistics of kind `gram`.

    Raises:
        SolverError: the Hessian cannot be factorised.
    """
    factor = statistics.factor(DAMPING)
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    columns[factor.dead] = 0
    sweep = _Sweep(columns, torch.empty_like(columns, dtype=torch.bool), factor, pattern, sparsity)
    for left in range(0, len(columns), sweep.block):
        sweep.prune_block(left, min(left + sweep.block, len(columns)))
    return Solution(columns.t(), sweep.mask.t(), factor.retries, factor.damping)


@dataclass(frozen=True)
class _Sweep:
    """One pass over the `columns` [cols, rows], pruned in place; fills `mask` [cols, rows]."""

    columns: Tensor
    mask: Tensor
    factor: Factor
    pattern: Pattern
    sparsity: float

    @property
    def unit(self) -> int:
        """Number of columns whose zeros are chosen together: a group of N:M, or a block."""
        return self.pattern.m if isinstance(self.pattern, NM) else BLOCK

    @property
    def block(self) -> int:
        """Number of columns that correct all those to their right in one product: whole units."""
        return max(1, BLOCK // self.unit) * self.unit

    def prune_block(self, left: int, right: int) -> None:
        """Prune the columns [left, right) and correct everything to their right."""
        lost = torch.empty_like(self.columns[left:right])
        self._over_units(left, right, lost)
        self._correct(left, right, len(self.columns), lost)

    def _over_units(self, left: int, right: int, lost: Tensor) -> None:
        """Prune the columns [left, right), whole units; `lost` [right - left, rows] receives what they lose."""
        units = -(-(right - left) // self.unit)
        if units == 1:
            self._choose(left, right)
            self._over_columns(left, right, lost, self.mask[left:right].to(self.columns.dtype))
        else:
            size = units // 2 * self.unit
            self._over_units(left, left + size, lost[:size])
            self._correct(left, left + size, right, lost[:size])
            self._over_units(left + size, right, lost[size:])

    def _over_columns(self, left: int, right: int, lost: Tensor, chosen: Tensor) -> None:
        """Prune the columns [left, right); `chosen` [right - left, rows] is 1 at pruned weights, else 0."""
        if right - left == 1:
            torch.mul(self.columns[left], chosen[0], out=lost[0])
            self.columns[left].sub_(lost[0])  # exactly zero where pruned, unchanged elsewhere
        else:
            half = (right - left) // 2
            self._over_columns(left, left + half, lost[:half], chosen[:half])
            self._correct(left, left + half, right, lost[:half])
            self._over_columns(left + half, right, lost[half:], chosen[half:])

    def _correct(self, left: int, middle: int, right: int, lost: Tensor) -> None:
        """Correct the columns [middle, right) for what [left, middle) lost."""
        if middle < right:
            steps = self.factor.steps[left:middle, middle:right]
            add_product(self.columns[middle:right], steps.t(), lost, alpha=-1)

    def _choose(self, left: int, right: int) -> None:
        """Choose the zeros of one unit by w^2 / u_jj^2 (equation 3), on the weights as corrected so far."""
        scores = (self.columns[left:right] / self.factor.diagonal[left:right].unsqueeze(1)).square_()
        if isinstance(self.pattern, NM):
            self.mask[left:right] = self.pattern.mask(scores.t(), self.sparsity, per_row=True).t()
        else:
            cols, rows = self.columns.shape
            counts = cumulative_counts(cols, rows, self.sparsity)  # per column, with an exact total
            self.mask[left:right] = smallest(scores, int(counts[left:right].sum()))
