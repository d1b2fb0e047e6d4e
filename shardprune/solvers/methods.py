"""The interface and the table of pruning methods."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from shardprune.solvers.pattern import Pattern
    from shardprune.solvers.statistics import InputStatistics, Kind

Sweep = Literal["kernel", "recursion"]


@dataclass(frozen=True)
class Target:
    """A projection to prune.

    Attributes:
        weight: dense, [rows, cols] in any floating dtype; stays as it is.
        pattern: where zeros may stand.
        sparsity: fraction of its weights that become zero.
    """

    weight: "Tensor"
    pattern: "Pattern"
    sparsity: float


@dataclass(frozen=True)
class Solution:
    """A pruned projection.

    Attributes:
        weight: float32 [rows, cols].
        mask: bool [rows, cols], True where pruned.
        retries: damping increases that the factorisation needed.
        damping: its final damping; None without a factorisation.
        lost: ||XW - XW'||^2 over the calibration tokens, 0-dim float64 on the device, where the method knows it.
        sweep: the way of the steps over columns, where there are any: `kernel` (Triton) or `recursion`.
    """

    weight: "Tensor"
    mask: "Tensor"
    retries: int = 0
    damping: float | None = None
    lost: "Tensor | None" = None
    sweep: Sweep | None = None


@dataclass(frozen=True)
class Effort:
    """What a method does with the projections that read one input, for plans and for a run's progress.

    Attributes:
        sweeps: factorises the Gram matrix and goes over the columns, of which it changes those behind; what outputs
            lose is known then. Other methods only select the weights that become zero.
        sorts: sorts weights to select them; otherwise finds a threshold, unless the pattern has groups.
        passes: how often it does all that.
        touched: bytes that are read and written for a weight, beside sorting.
        running: bytes of further values beside each weight, for which all weights are sorted at once; 0: none, and a
            bounded number of weights is sorted at a time.
    """

    sweeps: bool = False
    sorts: bool = False
    passes: int = 1
    touched: int = 120
    running: int = 0


# `prune(weight, statistics, pattern, sparsity)` of a method; the statistics may be None where it needs none.
Solver = Callable[["Tensor", "InputStatistics | None", "Pattern", float], Solution]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        solver: module and function, imported on first use: recipes are read without torch.
        needs: kind of statistics that it requires; None: weights alone.
        effort: of a solution; what `shardprune plan` computes memory and seconds from.
        named: whether it is a value of a recipe's `method`; `wanda-variant` is chosen by an option.
        together: module and function `prune_together(targets, statistics)` of a method that gains by solving the
            projections that read one input at once; it returns their solutions in order.
    """

    solver: str
    needs: "Kind | None"
    effort: Effort
    named: bool = True
    together: str | None = None

    @property
    def prune(self) -> "Solver":
        """The function `prune(weight, statistics, pattern, sparsity)`, which leaves its float32 weight [rows, cols]
        unchanged.
        """
        return _function(self.solver)

    def solve(self, targets: Sequence[Target], statistics: "InputStatistics | None") -> Iterator[Solution]:
        """Yield the solutions of the projections that read one input: one after the other, or of all at once."""
        if self.together:
            yield from _function(self.together)(targets, statistics)
        else:
            for target in targets:
                yield self.prune(target.weight.float(), statistics, target.pattern, target.sparsity)


def _function(name: str) -> Any:
    module, function = name.split(".")
    return getattr(import_module(f"shardprune.solvers.{module}"), function)


SORTING = Effort(sorts=True, touched=60)
METHODS: dict[str, Method] = {
    "magnitude": Method("magnitude.prune", needs=None, effort=Effort()),
    "wanda": Method("wanda.prune", needs="squares", effort=SORTING),
    "wanda-variant": Method("wanda.prune_variant", needs="squares", effort=replace(SORTING, running=28), named=False),
    "sparsegpt": Method("sparsegpt.prune", "gram", Effort(sweeps=True), together="sparsegpt.prune_together"),
}
