"""The solution of each projection that is best on calibration windows that are held out: its damping, and whether its
kept weights are fitted.

The windows held out have no other use afterwards: the last solution is that of all.

Damping is what a solver believes of its Gram matrix: too little fits the calibration tokens, too much prunes by
magnitude. How much is best depends on the sparsity, the method and the number of tokens. Near the best, errors are flat
over a decade of damping, and a few windows cannot say where in it the least is. A method that chooses zeros greedily
takes the largest value there, which depends least on the calibration text (as the most regularised model within an
error of the best, Breiman et al. 1984); weights that are fitted lose by that, and take the best. In the groups of N:M
less is near: damping gains little there, and losses add up over layers (docs/pruning.md#damping).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.least_squares import refit
from shardprune.solvers.methods import Method, Target
from shardprune.solvers.pattern import NM
from shardprune.solvers.statistics import InputStatistics, gram_norm


def choose(
    method: Method, targets: Sequence[Target], statistics: InputStatistics, dampings: Sequence[float]
) -> list[Target]:
    """Return the projections that read one input, each with the largest of `dampings` whose solution loses on the
    held-out windows at most by `method.slack` more than the best. Those that are to be refitted are, with the damping
    that is best then, where that loses less.

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
    slack = [method.slack.in_groups if isinstance(target.pattern, NM) else method.slack.anywhere for target in targets]
    solved, refitted = _best(plain, slack), _best(fitted, [0.0] * len(targets))
    chosen = []
    for target, (error, place), (fit_error, fit_place) in zip(targets, solved.tolist(), refitted.tolist(), strict=True):
        if min(error, fit_error) == float("inf"):
            raise SolverError("the pruned weight is not finite")
        if target.refit and fit_error < error:
            chosen.append(replace(target, damping=dampings[int(fit_place)]))
        else:
            chosen.append(replace(target, damping=dampings[int(place)], refit=False))
    return chosen


def _best(lost: list[Tensor], slack: list[float]) -> Tensor:
    """Return float64 [projections, 2]: what each loses with the damping that it gets, and the place of that.

    Args:
        lost: by each damping, float64 [projections].
        slack: of each projection, the fraction by which it may lose more than the least.
    """
    errors = torch.stack(lost).nan_to_num_(nan=float("inf"))
    best, _ = errors.min(dim=0)
    allowed = best * (1 + torch.tensor(slack, dtype=torch.float64)).to(best.device)
    # Dampings ascend: the last place is that of the largest.
    places = len(errors) - 1 - (errors <= allowed).flip(0).double().argmax(dim=0)
    return torch.stack([errors.gather(0, places.unsqueeze(0))[0], places.double()], dim=1)
