"""The table of pruning methods, and what each of them takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from shardprune.solvers.pattern import Pattern
    from shardprune.solvers.statistics import InputStatistics, Kind


@dataclass(frozen=True)
class Solution:
    """A pruned projection: `weight` [rows, cols] float32, `mask` [rows, cols] True where pruned, how
    many `retries` the factorisation needed and the `damping` it ended with (None: no factorisation)."""

    weight: "Tensor"
    mask: "Tensor"
    retries: int = 0
    damping: float | None = None


# `prune(weight, statistics, pattern, sparsity)` of a method; the statistics may be None where it needs none.
Solver = Callable[["Tensor", "InputStatistics | None", "Pattern", float], Solution]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    `solver` is the module and function that prune, imported when they are first used: recipes are read without
    torch. `needs` is the kind of statistics it cannot do without (None: the weights are enough). A recipe's
    `method` is a row that is `named`.
    """

    solver: str
    needs: "Kind | None"
    named: bool = True

    @property
    def prune(self) -> "Solver":
        """`prune(weight, statistics, pattern, sparsity)` takes a float32 weight [rows, cols] and leaves it as it is."""
        module, function = self.solver.split(".")
        return getattr(import_module(f"shardprune.solvers.{module}"), function)


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude.prune", needs=None),
    "wanda": Method("wanda.prune", needs="squares"),
    "wanda-variant": Method("wanda.prune_variant", needs="squares", named=False),  # by an option of its own
    "sparsegpt": Method("sparsegpt.prune", needs="gram"),
}
