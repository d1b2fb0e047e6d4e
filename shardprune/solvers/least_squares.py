"""Least squares of a projection under a mask: conjugate gradients over its kept weights (ALPS, arXiv 2406.07831,
algorithm 2).

With the damped Gram matrix scaled to a unit diagonal, H = D^-1 (X^T X + ridge I) D^-1, D = diag(norms), and weights
scaled likewise, B = W D, what outputs lose is

    ||X (W - W')||^2 + ridge ||W - W'||^2 = tr((B - B') H (B - B')^T),

a problem for each row. Rows descend together, each with its own steps; conjugate gradients on H are those of X^T X with
its diagonal as preconditioner.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardprune.solvers.methods import REFIT_STEPS, Solution, Solve, Target
from shardprune.solvers.products import add_product, product
from shardprune.solvers.statistics import InputStatistics

TINY = torch.finfo(torch.float32).tiny
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of the eigenvalues of a matrix with a unit diagonal, by sqrt(cols)


@dataclass(frozen=True)
class UnitGram:
    """A damped Gram matrix with a unit diagonal.

    Attributes:
        matrix: H, float32 [cols, cols].
        norms: D's diagonal, float32 [cols].
        dead: inputs that are always zero, bool [cols].
    """

    matrix: Tensor
    norms: Tensor
    dead: Tensor

    @classmethod
    def of(cls, statistics: InputStatistics, damping: float) -> "UnitGram":
        """Return that of statistics of kind `gram`, with a fraction `damping` of the mean diagonal added to it."""
        gram = statistics.gram
        diagonal = gram.diagonal()
        dead = diagonal == 0
        ridge = damping * diagonal.mean()
        norms = (diagonal + ridge).sqrt_()
        norms.masked_fill_(norms == 0, 1)  # dead, and not damped
        matrix = gram / norms
        matrix.div_(norms.unsqueeze(1))
        matrix.diagonal().fill_(1)
        return cls(matrix, norms, dead)

    def scaled(self, weight: Tensor) -> Tensor:
        """Return B = W D of a weight [rows, cols] of any floating dtype, float32, with zeros at dead inputs."""
        return (weight * self.norms).masked_fill_(self.dead, 0)


def descend(start: Tensor, image: Tensor, fixed: Tensor, unit: UnitGram, steps: int) -> Tensor:
    """Return B' after some steps of conjugate gradients from `start` down tr((B - B') H (B - B')^T), float32.

    A row ends where H along its way is nothing but rounding: a Gram matrix of fewer tokens than inputs, not damped, is
    rounded to one with negative eigenvalues, down which a step has no end.

    Args:
        start: B' [rows, cols]; overwritten.
        image: B H [rows, cols]; overwritten.
        fixed: bool [rows, cols], True where B' stays as it is.
    """
    rest = add_product(image, start, unit.matrix, alpha=-1).masked_fill_(fixed, 0)
    way = rest.clone()
    size = rest.square().sum(1, keepdim=True)
    ended = torch.zeros_like(size, dtype=torch.bool)
    rounding = ROUNDING * len(unit.matrix) ** 0.5
    for _ in range(steps):
        turned = product(way, unit.matrix).masked_fill_(fixed, 0)
        curvature = (way * turned).sum(1, keepdim=True)
        flat = curvature / way.square().sum(1, keepdim=True).clamp_min_(TINY)
        ended |= flat <= rounding
        length = (size / curvature).masked_fill_(ended, 0)
        start.addcmul_(way, length)
        rest.addcmul_(turned, length, value=-1)
        before, size = size, rest.square().sum(1, keepdim=True)
        way.mul_(size / before.clamp_min_(TINY)).add_(rest)
    return start


def refit(
    solutions: Iterator[Solution], targets: Sequence[Target], statistics: InputStatistics, steps: int = REFIT_STEPS
) -> Iterator[Solution]:
    """Yield the solutions of the projections that read one input, the kept weights of those that are to be refitted
    fitted to the dense outputs.

    Args:
        solutions: those of the targets, in order.
        steps: of conjugate gradients, each a product of the weight with the Gram matrix.
    """
    unit: UnitGram | None = None
    damping: float | None = None
    for target, solution in zip(targets, solutions, strict=True):
        if not target.refit:
            yield solution
            continue
        if unit is None or target.damping != damping:
            damping = target.damping
            unit = UnitGram.of(statistics, damping)
        image = product(unit.scaled(target.weight), unit.matrix)
        fixed = solution.mask | unit.dead
        fitted = descend(solution.weight * unit.norms, image, fixed, unit, steps)
        yield replace(solution, weight=fitted.div_(unit.norms), refit_steps=steps, lost=None)


def fitting(solve: Solve) -> Solve:
    """Return how a method solves where kept weights are fitted in the end."""

    def fitted(targets: Sequence[Target], statistics: InputStatistics | None) -> Iterator[Solution]:
        assert statistics is not None
        return refit(solve(targets, statistics), targets, statistics)

    return fitted
