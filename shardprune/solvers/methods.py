"""The interface and the table of pruning methods."""

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
    """A pruned projection.

    Attributes:
        weight: float32 [rows, cols].
        mask: bool [rows, cols], True where pruned.
        retries: damping increases that the factorisation needed.
        damping: its final damping; None without a factorisation.
    """

    weight: "Tensor"
    mask: "Tensor"
    retries: int = 0
    damping: float | None = None


# `prune(weight, statistics, pattern, sparsity)` of a method; the statistics may be None where it needs none.
Solver = Callable[["Tensor", "InputStatistics | None", "Pattern", float], Solution]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        solver: module and function, imported on first use: recipes are read without torch.
        needs: kind of statistics that it requires; None: weights alone.
        named: whether it is a value of a recipe's `method`.
    """

    solver: str
    needs: "Kind | None"
    named: bool = True

    @property
    def prune(self) -> "Solver":
        """The function `prune(weight, statistics, pattern, sparsity)`, which leaves its float32 weight [rows, cols]
        unchanged.
        """
        module, function = self.solver.split(".")
        return getattr(import_module(f"shardprune.solvers.{module}"), function)


METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude.prune", needs=None),
    "wanda": Method("wanda.prune", needs="squares"),
    "wanda-variant": Method("wanda.prune_variant", needs="squares", named=False),  # chosen by an option
    "sparsegpt": Method("sparsegpt.prune", needs="gram"),
}
