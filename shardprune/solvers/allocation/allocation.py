"""What every allocation takes and gives."""

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
    """What one projection is to give up: its `sparsity`, and its `outliers` ratio in percent (None where the
    allocation looks at none)."""

    sparsity: float
    outliers: float | None = None


@dataclass(frozen=True)
class Allocation:
    """A row of the table of allocations.

    `allocate(projections, outliers, target, spread)` gives each projection its sparsity; `outliers` has one entry per
    layer where the allocation `observes` and none else, and `spread` (lambda) is half the width of the range in which
    the sparsities lie. An `exact` allocation has the target as the mean over all weights.
    """

    allocate: Callable[[list[Projection], "list[Outliers]", float, float], Sparsities]
    observes: bool
    exact: bool = True
