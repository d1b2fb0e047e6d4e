"""Mosaic (arXiv 2504.06323): the projection outlier distribution, as published and as released."""

from typing import TYPE_CHECKING

import numpy as np

from shardprune.solvers.allocation.allocation import Projection, Sparsities
from shardprune.solvers.allocation.budget import HIGHEST, meet, spread_over

if TYPE_CHECKING:
    from shardprune.solvers.outliers import Outliers

LOWEST_RELEASED = 0.01


def allocate(projections: list[Projection], outliers: "list[Outliers]", target: float, spread: float) -> Sparsities:
    """Return one sparsity per projection, lower for more outliers.

    Ratios of all (layer, projection) pairs are mapped to [0, 2 lambda] and centred with the projections' numbers of
    weights.
    """
    ratios = [outliers[projection.layer].projections[projection.name] for projection in projections]
    weights = [projection.weights for projection in projections]
    sparsities = meet(-spread_over(ratios, spread), weights, target)
    return {
        (projection.layer, projection.name): float(sparsity)
        for projection, sparsity in zip(projections, sparsities, strict=True)
    }


def allocate_as_released(
    projections: list[Projection], outliers: "list[Outliers]", target: float, spread: float
) -> Sparsities:
    """Return the sparsities of the authors' released code; their mean is not the target.

    A layer's ratios, and each projection's ratios over the layers, are mapped to [0, 2 lambda] separately; the sparsity
    is 1 - (layer's value - mean over layers of the projection's values + 1 - target), at least 0.01. It is clipped at
    `HIGHEST`; the released code would empty such a projection.
    """
    layers = sorted({projection.layer for projection in projections})
    spreads = spread_over([outliers[layer].layer for layer in layers], spread)
    of_layers = dict(zip(layers, spreads, strict=True))
    ratios: dict[str, list[float]] = {}  # over the layers that have the projection
    for projection in projections:
        ratios.setdefault(projection.name, []).append(outliers[projection.layer].projections[projection.name])
    means = {name: np.mean(spread_over(own, spread)) for name, own in ratios.items()}
    sparsities = {}
    for projection in projections:
        density = of_layers[projection.layer] - means[projection.name] + 1 - target
        sparsities[projection.layer, projection.name] = float(np.clip(1 - density, LOWEST_RELEASED, HIGHEST))
    return sparsities
