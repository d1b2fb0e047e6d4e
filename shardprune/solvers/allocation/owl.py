"""OWL (Yin et al., arXiv 2310.05175): layers with more outliers keep more weights."""

from typing import TYPE_CHECKING

from shardprune.solvers.allocation.allocation import Projection, Sparsities
from shardprune.solvers.allocation.budget import meet, spread_over

if TYPE_CHECKING:
    from shardprune.solvers.outliers import Outliers


def allocate(projections: list[Projection], outliers: "list[Outliers]", target: float, spread: float) -> Sparsities:
    """Return one sparsity per layer (section 3.3), within target +- 2 lambda and with the target as mean.

    1 - S are the layers' outlier ratios, mapped to [0, 2 lambda] and centred.
    """
    weights: dict[int, int] = {}  # of the layers that have projections
    for projection in projections:
        weights[projection.layer] = weights.get(projection.layer, 0) + projection.weights
    ratios = [outliers[layer].layer for layer in weights]
    found = dict(zip(weights, meet(-spread_over(ratios, spread), list(weights.values()), target), strict=True))
    return {(projection.layer, projection.name): float(found[projection.layer]) for projection in projections}
