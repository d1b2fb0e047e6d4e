"""The solution of each projection that is best on calibration windows that are held out: its damping, and whether its
kept weights are fitted.

The windows held out have no other use afterwards: the last solution is that of all.

Damping is what a solver believes of its Gram matrix: too little fits the calibration tokens, too much prunes by
magnitude. How much is best depends on the sparsity, the method and the number of tokens. Near the best, errors are flat
over a decade of damping, and a few windows cannot say where in it the least is. A method that chooses zeros greedily
takes the largest value there, which depends least on the calibration text (as the most regularised model within an
error of the best, Breiman et al. 1984); weights that are fitted lose by that, and take the best.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.least_squares import refit
from shardprune.solvers.methods import Method, Target
from shardprune.solvers.statistics import InputStatistics, gram_norm


def choose(
    method: Method, targets: Sequence[Target], statistics: InputStatistics, dampings: Sequence[float]
) -> list[Target]:
    """Return the projections that read one input, each with the largest of `dampings` whose solution loses on the
    held-out windows at most a fraction `method.slack` more than the best. Those that are to be refitted are, with the
    damping that is best then, where that loses less.

    Args:
        method: by which they are solved, once for each value.
        statistics: of kind `gram`, with those of held-out windows.
        dampings: ascending.

    Raises:
        SolverError: of the solver; or its solutions are finite with none of the values.
    """
    assert statistics.held_out is not None
    held_out = statistics.held_out.sums
    plain, fitted = [], []
    for damping in dampings:
        tried = [replace(target, damping=damping) for target in targets]
        losses = []
        for target, solution in zip(tried, method.solve(tried, statistics), strict=True):
            lost = [gram_norm(target.weight.float() - solution.weight, held_out)]
            if target.refit:
                (fit,) = refit(iter([solution]), [target], statistics)
                lost.append(gram_norm(target.weight.float() - fit.weight, held_out))
            losses.append(lost)
        plain.append(torch.stack([lost[0] for lost in losses]))
        fitted.append(torch.stack([lost[-1] for lost in losses]))
        statistics.forget_factors()  # as large as the sums
    solved, refitted = _best(plain, method.slack), _best(fitted, 0.0)
    chosen = []
    for target, (error, place), (fit_error, fit_place) in zip(targets, solved.tolist(), refitted.tolist(), strict=True):
        if min(error, fit_error) == float("inf"):
            raise SolverError("the pruned weight is not finite")
        if target.refit and fit_error < error:
            chosen.append(replace(target, damping=dampings[int(fit_place)]))
        else:
            chosen.append(replace(target, damping=dampings[int(place)], refit=False))
    return chosen


def _best(lost: list[Tensor], slack: float) -> Tensor:
    """Return float64 [projections, 2]: what each loses with the damping that it gets, and the place of that.

    Args:
        lost: by each damping, float64 [projections].
    """
    errors = torch.stack(lost).nan_to_num_(nan=float("inf"))
    best, _ = errors.min(dim=0)
    # Dampings ascend: the last place is that of the largest.
    places = len(errors) - 1 - (errors <= (1 + slack) * best).flip(0).double().argmax(dim=0)
    return torch.stack([errors.gather(0, places.unsqueeze(0))[0], places.double()], dim=1)
