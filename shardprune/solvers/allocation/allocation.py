"""The interface of allocations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardprune.solvers.outliers import Outliers


Sparsities = dict[tuple[int, str], float]  # of each projection by layer and name


@dataclass(frozen=True)
class Projection:
    """One projection of a model: its layer, its name and its number of weights."""

    layer: int
    name: str
    weights: int


@dataclass(frozen=True)
class Share:
    """The assignment of one projection: its `sparsity`, and its ratio of `outliers` in percent (None if the allocation
    does not measure it).
    """

    sparsity: float
    outliers: float | None = None


@dataclass(frozen=True)
class Allocation:
    """A row of the table of allocations.

    `allocate(projections, outliers, target, spread)` returns a sparsity for each projection; `outliers` has one entry
    per layer if the allocation `observes`, else it is empty. `spread` is lambda: sparsities lie within target +- 2
    lambda at most. The mean over all weights of an `exact` allocation is the target. None in the place of a function
    stands for error curves, which are measured and shared out.
    """

    allocate: Callable[[list[Projection], "list[Outliers]", float, float], Sparsities] | None
    observes: bool
    exact: bool = True
