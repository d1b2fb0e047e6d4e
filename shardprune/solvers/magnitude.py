"""Magnitude pruning: zero the smallest weights of a projection."""

from torch import Tensor

from shardprune.solvers.methods import Solution
from shardprune.solvers.pattern import Pattern
from shardprune.solvers.statistics import InputStatistics


def prune(weight: Tensor, statistics: InputStatistics | None, pattern: Pattern, sparsity: float) -> Solution:
    """Zero the smallest |w| of `weight` [rows, cols], compared over the whole projection."""
    mask = pattern.mask(weight.abs(), sparsity, per_row=False)
    return Solution(weight.masked_fill(mask, 0), mask)
