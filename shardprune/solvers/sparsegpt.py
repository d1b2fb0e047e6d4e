"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column, let the rest make up.

Going through the columns from left to right, the error of a pruned column j is spread over the columns
to its right: with H^-1 = U^T U, w_k -= w_j * (u_jk / u_jj) for every k > j (algorithm 1).

The weights are kept transposed, [cols, rows], so that a column's step touches contiguous memory, and
the updates are nested: each column corrects the rest of its panel at once, a finished panel corrects
the rest of its block in one product, a finished block the rest of the matrix in another.
"""

import torch
from torch import Tensor

from shardprune.solvers.factor import Factor
from shardprune.solvers.method import Solution
from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.selection import cumulative_counts, smallest
from shardprune.solvers.statistics import InputStatistics

DAMPING = 0.01
BLOCK = 128
PANEL = 32


def prune(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Prune `weight` [rows, cols] and correct what remains, from statistics of kind `gram`.

    Raises:
        SolverError: the Hessian cannot be factorised.
    """
    factor = statistics.factor(DAMPING)
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    columns[factor.dead] = 0
    mask = torch.zeros_like(columns, dtype=torch.bool)

    panel, block = _sizes(pattern)
    cols = len(columns)
    budget = _budget(columns, block, sparsity)
    for index, start in enumerate(range(0, cols, block)):
        end = min(start + block, cols)
        # Row j of the steps, times the value that column j loses, is what the columns right of j lose.
        steps = factor.upper[start:end, start:] / factor.upper.diagonal()[start:end].unsqueeze(1)
        if not isinstance(pattern, NM):
            # One selection for the whole block, on the weights as the blocks before it left them.
            mask[start:end] = smallest(_saliency(columns, factor, start, end), budget[index])
        pruned = torch.empty_like(columns[start:end])
        for left in range(start, end, panel):
            right = min(left + panel, end)
            lost = pruned[left - start : right - start]
            tile = steps[left - start : right - start, left - start :]
            _prune_panel(columns, mask, lost, tile, factor, pattern, left, right)
            _correct(columns[right:end], lost, tile[:, right - left : end - left])
        _correct(columns[end:], pruned, steps[:, end - start :])
    return Solution(columns.t().contiguous(), mask.t().contiguous(), factor.retries, factor.damping)


def _sizes(pattern: Pattern) -> tuple[int, int]:
    """Panel and block widths; a group of an N:M pattern never crosses the edge of a panel."""
    if not isinstance(pattern, NM):
        return PANEL, BLOCK
    panel = max(1, PANEL // pattern.m) * pattern.m
    return panel, max(1, BLOCK // panel) * panel


def _budget(columns: Tensor, block: int, sparsity: float) -> list[int]:
    """How many weights to prune in each block, for a total within half a weight of the target."""
    cols, rows = columns.shape
    per_column = cumulative_counts(cols, rows, sparsity)
    return [int(part.sum()) for part in per_column.split(block)]


def _saliency(columns: Tensor, factor: Factor, start: int, end: int) -> Tensor:
    """w^2 / u_jj^2 of the columns [start, end), [end - start, rows] (equation 3)."""
    diagonal = factor.upper.diagonal()[start:end].unsqueeze(1)
    return (columns[start:end] / diagonal).square()


def _prune_panel(
    columns: Tensor, mask: Tensor, lost: Tensor, tile: Tensor, factor: Factor, pattern: Pattern, left: int, right: int
) -> None:
    """Prune the columns [left, right) one after another and correct the rest of the panel.

    Fills `lost` [right - left, rows] with the values that were pruned, zero where nothing was.
    """
    chosen_of_panel = None if isinstance(pattern, NM) else mask[left:right].to(columns.dtype)
    for j in range(left, right):
        if isinstance(pattern, NM) and (j - left) % pattern.m == 0:
            group = slice(j, min(j + pattern.m, right))
            scores = _saliency(columns, factor, group.start, group.stop)
            mask[group] = pattern.mask(scores.t(), pattern.sparsity, per_row=True).t()
        chosen = mask[j].to(columns.dtype) if chosen_of_panel is None else chosen_of_panel[j - left]
        value = torch.mul(columns[j], chosen, out=lost[j - left])
        columns[j].sub_(value)
        if j + 1 < right:
            step = tile[j - left, j - left + 1 : right - left]
            columns[j + 1 : right].addmm_(step.unsqueeze(1), value.unsqueeze(0), alpha=-1)


def _correct(columns: Tensor, lost: Tensor, steps: Tensor) -> None:
    """Correct columns [count, rows] for the values [pruned, rows] lost to their left, by steps [pruned, count]."""
    if len(columns):
        columns.addmm_(steps.t(), lost, alpha=-1)
