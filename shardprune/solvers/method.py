"""What every pruning method takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from shardprune.solvers.pattern import Pattern
from shardprune.solvers.statistics import InputStatistics, Kind


@dataclass(frozen=True)
class Solution:
    """A pruned projection: `weight` [rows, cols] float32, `mask` [rows, cols] True where pruned, how
    many `retries` the factorisation needed and the `damping` it ended with (None: no factorisation)."""

    weight: Tensor
    mask: Tensor
    retries: int = 0
    damping: float | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    `prune(weight, statistics, pattern, sparsity)` takes a float32 weight [rows, cols] that it leaves
    as it is; `needs` is the kind of statistics it cannot do without (None: the weights are enough).
    """

    prune: Callable[[Tensor, InputStatistics, Pattern, float], Solution]
    needs: Kind | None
