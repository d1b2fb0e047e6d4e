"""From a profile over layers or projections to sparsities that spend a budget exactly."""

from collections.abc import Sequence

import numpy as np

TOLERANCE = 5e-5  # of a target: what four digits of it show
HIGHEST = 0.99  # sparsity of any one projection: none is emptied to fill what others may not take


def spread_over(ratios: Sequence[float], spread: float) -> np.ndarray:
    """Ratios mapped linearly to [0, 2 * spread]; all zero where they do not differ."""
    values = np.asarray(ratios, dtype=np.float64)
    width = values.max() - values.min()
    return (values - values.min()) / width * (2 * spread) if width > 0 else np.zeros_like(values)


def meet(profile: np.ndarray, weights: Sequence[int], target: float) -> np.ndarray:
    """The sparsities `clip(profile + shift, 0, HIGHEST)` whose mean, weighted by `weights`, is the target.

    Where nothing is clipped this centres the profile on the target; what clipping takes from some is
    spread evenly over the rest. The mean grows with the shift, so that halving an interval finds it.

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
