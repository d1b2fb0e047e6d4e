"""The damping of each projection, chosen by the error of its outputs on calibration windows that are held out.

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

from shardprune.errors import SolverError
from shardprune.solvers.methods import DAMPINGS, Solve, Target
from shardprune.solvers.statistics import InputStatistics, gram_norm


def choose(solve: Solve, targets: Sequence[Target], statistics: InputStatistics, slack: float) -> list[Target]:
    """Return the projections that read one input, each with the largest of `DAMPINGS` whose solution loses on the
    held-out windows at most a fraction `slack` more than the best.

    Args:
        solve: how the projections are solved; once for each value.
        statistics: of kind `gram`, with those of held-out windows.

    Raises:
        SolverError: of the solver; or its solutions are finite with none of the values.
    """
    assert statistics.held_out is not None
    lost = []
    for damping in DAMPINGS:
        tried = [replace(target, damping=damping) for target in targets]
        lost.append(
            torch.stack(
                [
                    gram_norm(target.weight.float() - solution.weight, statistics.held_out.sums)
                    for target, solution in zip(targets, solve(tried, statistics), strict=True)
                ]
            )
        )
        statistics.forget_factors()  # as large as the sums
    errors = torch.stack(lost).nan_to_num_(nan=float("inf"))
    best, _ = errors.min(dim=0)
    # Dampings ascend: the last place is that of the largest.
    places = (len(DAMPINGS) - 1 - (errors <= (1 + slack) * best).flip(0).double().argmax(dim=0)).double()
    found, dampings = torch.stack([best, places]).tolist()
    if float("inf") in found:
        raise SolverError("the pruned weight is not finite")
    return [replace(target, damping=DAMPINGS[int(place)]) for target, place in zip(targets, dampings, strict=True)]
