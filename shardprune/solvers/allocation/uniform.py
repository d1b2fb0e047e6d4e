"""The same sparsity for every projection."""

from typing import TYPE_CHECKING

from shardprune.solvers.allocation.allocation import Projection, Sparsities

if TYPE_CHECKING:
    from shardprune.solvers.outliers import Outliers


def allocate(projections: list[Projection], outliers: "list[Outliers]", target: float, spread: float) -> Sparsities:
    """Return the target for every projection."""
    return {(projection.layer, projection.name): target for projection in projections}
