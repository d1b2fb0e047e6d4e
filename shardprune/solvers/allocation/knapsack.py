"""A knapsack over measured error curves: the allocation with the least total error that meets the target.

With l_p(t) the error that projection p of n_p weights adds where a fraction t of them is zero, the least of sum
l_p(t_p) under sum t_p n_p = target sum n_p has one price mu for every zero (Lagrange): each t_p is where
l_p(t) - mu n_p t is least, and mu is found by bisection. Between the levels at which it was measured, the logarithm
of a curve is linear.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.solvers.allocation.budget import meet

STEP = 0.01  # of sparsities that are compared
HALVINGS = 100
ROUNDING = 1e-12  # of a mean sparsity

Curve = Sequence[tuple[float, float]]  # levels of sparsity, ascending, each with the error there


def share_out(
    curves: Mapping[tuple[int, str], Curve], weights: Mapping[tuple[int, str], int], target: float
) -> Sparsities:
    """Return the sparsity of each projection; their mean over all weights is the target.

    Args:
        curves: by layer and name, all at the same levels.
        weights: numbers of weights, likewise.

    Raises:
        ValueError: the target is not between the lowest and the highest level.
    """
    places = sorted(curves)  # in whose order projections take what is left of the budget
    levels = np.array([level for level, _ in curves[places[0]]])
    if not levels[0] <= target <= levels[-1]:
        raise ValueError(f"curves from {levels[0]:g} to {levels[-1]:g} say nothing of a sparsity of {target:g}")
    grid = np.linspace(levels[0], levels[-1], 1 + max(1, round((levels[-1] - levels[0]) / STEP)))
    sizes = np.array([weights[place] for place in places], dtype=np.float64)
    smallest = np.finfo(np.float64).tiny
    errors = np.stack(
        [
            np.exp(np.interp(grid, levels, np.log([max(error, smallest) for _, error in curves[place]])))
            for place in places
        ]
    )

    errors /= errors.max()  # the scale of prices: any

    def chosen(price: float) -> np.ndarray:
        """Return the sparsities at a price of a zero, the lowest of several."""
        return grid[np.argmin(errors - price * sizes[:, None] * grid, axis=1)]

    share = sizes / sizes.sum()

    def too_few(price: float) -> bool:
        return share @ chosen(price) < target - ROUNDING  # the highest level alone may be below it by its last bit

    low, high = 0.0, 1.0
    while too_few(high):
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if too_few(middle) else (low, middle)
    # What a step of the grid is too much is given back evenly, so that the mean is the target.
    found = meet(_nearer(chosen(low), chosen(high), share, target), sizes.tolist(), target)
    return {place: float(sparsity) for place, sparsity in zip(places, found, strict=True)}


def _nearer(below: np.ndarray, above: np.ndarray, share: np.ndarray, target: float) -> np.ndarray:
    """Return sparsities between two choices of equal price, of which projections take the upper one in their order, as
    long as the mean stays below the target."""
    found = below.copy()
    for place in np.flatnonzero(above > below):
        if share @ found + share[place] * (above[place] - found[place]) <= target + ROUNDING:
            found[place] = above[place]
    return found
