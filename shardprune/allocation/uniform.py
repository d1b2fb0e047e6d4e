"""The same sparsity for every projection."""

from shardprune.allocation.allocation import Projection, Sparsities
from shardprune.solvers.outliers import Outliers


def allocate(projections: list[Projection], outliers: list[Outliers], target: float, spread: float) -> Sparsities:
    """The target for every projection."""
    return {(projection.layer, projection.name): target for projection in projections}
