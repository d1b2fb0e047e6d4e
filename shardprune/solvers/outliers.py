"""Outlier ratios (OWL, arXiv 2310.05175, equation 2) of Wanda's metric."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**24  # entries of the metric in memory at any time


@dataclass(frozen=True)
class Outliers:
    """Percentages of a layer's metric entries above M times their mean.

    `layer` compares all entries of the layer with the mean over them all; `projections` compares the
    entries of each projection with the projection's own mean.
    """

    layer: float
    projections: dict[str, float]


def outlier_ratios(projections: Mapping[str, tuple[Tensor, Tensor]], m: float) -> Outliers:
    """Return the outlier ratios of one layer's metric |w| * sqrt(s); 0 for a layer without projections.

    Two passes over the weights: the mean of the metric is sum_j sqrt(s_j) sum_i |w_ij| over the number of entries, so
    that the first needs column sums only; the second counts, a block of rows at a time.

    Args:
        projections: by name, a weight [rows, cols] and the mean squares s [cols] of its input.
        m: outlier threshold, as a multiple of the mean.
    """
    if not projections:
        return Outliers(0.0, {})
    sums = {
        name: float(torch.linalg.vector_norm(weight, 1, dim=0, dtype=torch.float64) @ squares.double().sqrt())
        for name, (weight, squares) in projections.items()
    }
    entries = {name: weight.numel() for name, (weight, _) in projections.items()}
    of_layer = m * sum(sums.values()) / sum(entries.values())
    above_of_layer, ratios = 0, {}
    for name, (weight, squares) in projections.items():
        above, own = _above(weight, squares, (of_layer, m * sums[name] / entries[name]))
        above_of_layer += above
        ratios[name] = 100 * own / entries[name]
    return Outliers(100 * above_of_layer / sum(entries.values()), ratios)


def _above(weight: Tensor, squares: Tensor, thresholds: tuple[float, float]) -> list[int]:
    """Count the entries of the metric above each threshold."""
    norms = squares.sqrt()
    counts = [0] * len(thresholds)
    for rows in weight.split(max(1, BLOCK // weight.shape[1])):
        metric = rows.abs() * norms
        for index, threshold in enumerate(thresholds):
            counts[index] += int((metric > threshold).count_nonzero())
    return counts
