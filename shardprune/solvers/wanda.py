"""Wanda (Sun et al., arXiv 2306.11695): weights judged together with the size of their inputs."""

from torch import Tensor

from shardprune.solvers.method import Solution
from shardprune.solvers.pattern import Pattern
from shardprune.solvers.statistics import InputStatistics


def scores(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """The metric |w| * sqrt(s), [rows, cols] (equation 1)."""
    return weight.abs() * statistics.mean_squares.sqrt()


def prune(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Zero the weights of `weight` [rows, cols] with the smallest metric, compared within each row."""
    mask = pattern.mask(scores(weight, statistics), sparsity, per_row=True)
    return Solution(weight.masked_fill(mask, 0), mask)
