"""Wanda (Sun et al., arXiv 2306.11695): weights times the norms of their inputs as pruning metric."""

import torch
from torch import Tensor

from shardprune.solvers.methods import Solution
from shardprune.solvers.pattern import Pattern
from shardprune.solvers.statistics import InputStatistics


def scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return the metric |w| * sqrt(s), [rows, cols] (equation 1)."""
    return weight.abs() * statistics.mean_squares.sqrt()


def prune(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Zero the weights of `weight` [rows, cols] with the smallest metric, compared within each row."""
    mask = pattern.mask(scores(weight, statistics), sparsity, per_row=True)
    return Solution(weight.masked_fill(mask, 0), mask)


def prune_variant(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Prune by Wanda's variant (`use_variant` of the authors' code), in which the sparsity of rows may differ.

    A row's weights are removed, smallest metric first, until they hold a share alpha of the row's summed metric. One
    alpha serves the whole projection. Instead of bisecting for it, every weight gets the alpha at which it is removed,
    its row's running sum over the row's total; the smallest of these over the projection are exactly as many as asked
    for.
    """
    ordered, order = scores(weight, statistics).sort(dim=1, stable=True)
    running = ordered.cumsum(dim=1, dtype=torch.float64)
    alphas = running / running[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    mask = pattern.mask(torch.empty_like(alphas).scatter_(1, order, alphas), sparsity, per_row=False)
    return Solution(weight.masked_fill(mask, 0), mask)
