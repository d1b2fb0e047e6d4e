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

DAMPING = 0.01  # fraction of the mean diagonal that is added to a Gram matrix
DAMPINGS = (0.01, 0.03, 0.1, 0.3)  # of which one is chosen, where it is measured
Damping = float | Literal["auto"]  # auto: measured for each projection
# ALPS: the penalties grow tenfold in equal ratios, with as many iterations at each.
PENALTIES = tuple(0.1 * 10 ** (place / 5) for place in range(6))
PER_PENALTY = 6
SUPPORT_STEPS = 10  # of conjugate gradients at its end, which starts near
REFIT_STEPS = 20  # of conjugate gradients on another method's mask


@dataclass(frozen=True)
class Target:
    """A projection to prune.

    Attributes:
        weight: dense, [rows, cols] in any floating dtype; stays as it is.
        pattern: where zeros may stand.
        sparsity: fraction of its weights that become zero.
        damping: fraction of the mean diagonal that is added to the Gram matrix, where the method takes it.
        refit: fit the kept weights in the end.
    """

    weight: "Tensor"
    pattern: "Pattern"
    sparsity: float
    damping: float = DAMPING
    refit: bool = False


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
        iterations: those in which all zeros were chosen, where there were any.
        refit_steps: those of conjugate gradients on the final mask, where there were any.
    """

    weight: "Tensor"
    mask: "Tensor"
    retries: int = 0
    damping: float | None = None
    lost: "Tensor | None" = None
    sweep: Sweep | None = None
    iterations: int | None = None
    refit_steps: int | None = None


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
        factors: how often it factorises a Gram matrix, beside a sweep.
        products: how often it multiplies all weights with a square matrix of their inputs, in all.
        states: bytes beside each weight that it holds for all projections that read an input.
    """

    sweeps: bool = False
    sorts: bool = False
    passes: int = 1
    touched: int = 120
    running: int = 0
    factors: int = 0
    products: float = 0
    states: int = 0

    @property
    def refitted(self) -> "Effort":
        """The effort with the kept weights fitted at the end."""
        return replace(self, products=self.products + REFIT_STEPS + 2)

    def times(self, count: int) -> "Effort":
        """The effort of so many solutions one after the other."""
        return replace(self, passes=count * self.passes, factors=count * self.factors, products=count * self.products)

    def operations(self, rows: int, cols: int) -> float:
        """Return the multiplications and additions in products for the projections [rows, cols] of an input, roughly;
        0 where nothing is multiplied."""
        swept = self.passes * (cols**3 + rows * cols**2) if self.sweeps else 0
        return swept + self.factors * cols**3 + 2 * self.products * rows * cols**2


@dataclass(frozen=True)
class Slack:
    """Fractions by which what a projection loses on held-out windows may be above the least, where damping is measured:
    with zeros that may stand anywhere, and with those of N:M, which are as many in every group."""

    anywhere: float = 0.0
    in_groups: float = 0.0


# Statistics may be None where a method needs none.
Solve = Callable[[Sequence[Target], "InputStatistics | None"], Iterator[Solution]]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        solve: `solve(targets, statistics)` yields the solutions of the projections that read one input, in order.
        needs: kind of statistics that it requires; None: weights alone.
        effort: of a solution; what `shardprune plan` computes memory and seconds from.
        slack: how much above the least it may lose for a larger damping, where damping is measured.
        named: whether it is a value of a recipe's `method`; `wanda-variant` is chosen by an option.
    """

    solve: Solve
    needs: "Kind | None"
    effort: Effort
    slack: Slack = Slack()
    named: bool = True


def one_by_one(name: str) -> Solve:
    """Return how a method solves that looks at each projection by itself: by the module and function `name`,
    `prune(weight, statistics, pattern, sparsity)`, which leaves its float32 weight [rows, cols] unchanged.
    """

    def solve(targets: Sequence[Target], statistics: "InputStatistics | None") -> Iterator[Solution]:
        prune = _function(name)
        for target in targets:
            yield prune(target.weight.float(), statistics, target.pattern, target.sparsity)

    return solve


def at_once(name: str) -> Solve:
    """Return how a method solves that gains by looking at all projections that read one input: by the module and
    function `name`, `prune_together(targets, statistics)`, which returns their solutions in order.
    """

    def solve(targets: Sequence[Target], statistics: "InputStatistics | None") -> Iterator[Solution]:
        yield from _function(name)(targets, statistics)

    return solve


def _function(name: str) -> Any:
    """Return a function of a solver's module, imported on first use: recipes are read without torch."""
    module, function = name.split(".")
    return getattr(import_module(f"shardprune.solvers.{module}"), function)


SORTING = Effort(sorts=True, touched=60)
# An iteration multiplies with a triangle twice; the dense weight's image and the first residual are two products more.
SPLITTING = Effort(
    passes=len(PENALTIES) * PER_PENALTY,
    touched=200,
    factors=len(PENALTIES),
    products=len(PENALTIES) * PER_PENALTY * 9 / 8 + SUPPORT_STEPS + 2,
    states=12,
)
METHODS: dict[str, Method] = {
    "magnitude": Method(one_by_one("magnitude.prune"), None, Effort()),
    "wanda": Method(one_by_one("wanda.prune"), "squares", SORTING),
    "wanda-variant": Method(one_by_one("wanda.prune_variant"), "squares", replace(SORTING, running=28), named=False),
    "sparsegpt": Method(at_once("sparsegpt.prune_together"), "gram", Effort(sweeps=True), Slack(0.03, 0.01)),
    "alps": Method(at_once("alps.prune_together"), "gram", SPLITTING),
}
