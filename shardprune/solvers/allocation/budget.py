"""The shift of a profile over layers or projections to sparsities whose mean is the target."""

from collections.abc import Sequence

import numpy as np

TOLERANCE = 5e-5  # of a target with four digits
HIGHEST = 0.99  # largest sparsity of a projection: none is emptied when others are clipped


def spread_over(ratios: Sequence[float], spread: float) -> np.ndarray:
    """Map ratios linearly to [0, 2 * spread]; all zero if they are equal."""
    values = np.asarray(ratios, dtype=np.float64)
    width = values.max() - values.min()
    return (values - values.min()) / width * (2 * spread) if width > 0 else np.zeros_like(values)


def meet(profile: np.ndarray, weights: Sequence[int], target: float) -> np.ndarray:
    """Return the sparsities `clip(profile + shift, 0, HIGHEST)` whose mean, weighted by `weights`, is the target.

    Without clipping this centres the profile on the target; the excess of clipped entries is spread evenly over the
    rest. The mean grows with the shift, so that bisection finds it.

    Raises:
        ValueError: the target is above `HIGHEST`.
    """
    if target > HIGHEST:
        raise ValueError(f"no sparsities up to {HIGHEST} have the mean {target}")
    share = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    low, high = -profile.max(), HIGHEST - profile.min()
    while low < (middle := (low + high) / 2) < high:
        if share @ np.clip(profile + middle, 0, HIGHEST) < target:
            low = middle
        else:
            high = middle
    return np.clip(profile + high, 0, HIGHEST)
