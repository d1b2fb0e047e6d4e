"""Mixed N:M (OWL's structured form): N of every layer out of a common M."""

from collections.abc import Collection, Mapping

import numpy as np

from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.solvers.allocation.budget import TOLERANCE


def nonzeros_in_all(target: float, layers: int, m: int) -> int:
    """Return the sum of N over all layers, of one size, for which the mean sparsity 1 - N/m is the target.

    Raises:
        ValueError: no integers have that mean; names the nearest targets that work.
    """
    total = (1 - target) * m * layers
    nearest = min(max(round(total), layers), m * layers)
    if abs(total - nearest) > TOLERANCE * m * layers:
        around = sorted({min(max(count, layers), m * layers) for count in (int(total), int(total) + 1)}, reverse=True)
        near = " or ".join(f"{1 - count / (m * layers):.4f}" for count in around)
        raise ValueError(f"N of {m} over {layers} layers cannot average to it; the nearest is {near}")
    return nearest


def nearness(m: int, sizes: Collection[int]) -> float:
    """Return how far from the target the mean of 1 - N/m over the weights of layers of some sizes may be: not at all
    where they are of one size, else half of what one of m in the largest makes."""
    return TOLERANCE if len(set(sizes)) <= 1 else max(sizes) / (2 * m * sum(sizes))


def in_groups(sparsities: Sparsities, target: float, m: int, weights: Mapping[int, int]) -> Sparsities:
    """Round one sparsity per layer to 1 - N/m with integer N in [1, m], so that their mean over all weights is as
    near to the target as `nearness` says.

    N is rounded down first; the layers that lose most by that then get one more until the mean is met.

    Args:
        weights: the weights of each layer.
    """
    layers = sorted({layer for layer, _ in sparsities})
    of_layer = {layer: sparsity for (layer, _), sparsity in sparsities.items()}
    wanted = np.array([(1 - of_layer[layer]) * m for layer in layers])
    sizes = np.array([weights[layer] for layer in layers], dtype=np.float64)
    goal = (1 - target) * m * sizes.sum()
    counts = np.clip(np.floor(wanted), 1, m)
    while True:
        missing = goal - counts @ sizes
        short = missing > 0
        losing = wanted - counts if short else counts - wanted
        room = counts < m if short else counts > 1
        # One more, or one less, comes nearer to it; so that no small layer makes up for all, only where it is wanted,
        # unless one of the largest layer would, too.
        room &= sizes < 2 * abs(missing)
        room &= (losing > 0) | (sizes.max() < 2 * abs(missing))
        if not room.any():
            break
        counts[int(np.where(room, losing, -np.inf).argmax())] += 1 if short else -1
    chosen = dict(zip(layers, counts, strict=True))
    return {(layer, name): float(1 - chosen[layer] / m) for layer, name in sparsities}
