"""ALPS (Meng et al., arXiv 2406.07831): choose the zeros of a projection all together, then fit what remains.

The pruned weight is split in two, B close to the dense weight's outputs and D with enough zeros, which a penalty rho
draws together (ADMM, equations 4 and 5). With H the damped Gram matrix of a unit diagonal and B_0 the dense weight:

    B = (B_0 H - V + rho D) (H + rho I)^-1,   D = the largest of B + V / rho,   V += rho (B - D).

Conjugate gradients on D's support end it. A unit diagonal makes rho a pure number, for which the authors' rule, which
watches how fast the support changes, takes much the same way on every matrix: 33 iterations, from 0.1 to about 1. Here
that way is fixed. It loses as much as theirs does (within 0.5 % on the small model of docs/quality.md), lets the
projections that read one input share their factors, and has no decision for which a host would wait for its GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.factor import upper_of_inverse
from shardprune.solvers.least_squares import UnitGram, descend
from shardprune.solvers.methods import PENALTIES, PER_PENALTY, SUPPORT_STEPS, Solution, Target
from shardprune.solvers.pattern import Pattern
from shardprune.solvers.products import product
from shardprune.solvers.statistics import InputStatistics
from shardprune.solvers.triangles import times_upper, times_upper_transposed


def prune(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Prune `weight` [rows, cols] and fit what remains, from statistics of kind `gram`.

    Raises:
        SolverError: the Gram matrix is not that of any inputs.
    """
    return prune_together([Target(weight, pattern, sparsity)], statistics)[0]


def prune_together(targets: Sequence[Target], statistics: InputStatistics) -> list[Solution]:
    """Prune the projections that read one input, each by itself but for the factors; the arguments of `prune`.

    Raises:
        SolverError: the Gram matrix is not that of any inputs.
    """
    solutions: dict[int, Solution] = {}
    for damping in dict.fromkeys(target.damping for target in targets):
        places = [place for place, target in enumerate(targets) if target.damping == damping]
        unit = UnitGram.of(statistics, damping)
        splits = [_Split(targets[place], unit) for place in places]
        for place_of_penalty, penalty in enumerate(PENALTIES):
            upper, fault = upper_of_inverse(unit.matrix, penalty)
            if place_of_penalty == 0 and bool(fault):  # the one look that waits for the device; larger ones add to it
                raise SolverError(f"the Gram matrix is not positive definite with damping {damping:g}")
            for split in splits:
                for _ in range(PER_PENALTY):
                    split.step(upper, penalty)
            del upper
        for place in places:
            solutions[place] = splits.pop(0).solution(unit, damping)
    return [solutions[place] for place in range(len(targets))]


class _Split:
    """A projection that is being split: `image` is B_0 H, `sparse` D, `pull` V, float32 [rows, cols]."""

    def __init__(self, target: Target, unit: UnitGram) -> None:
        self._target = target
        dense = unit.scaled(target.weight)
        self.image = product(dense, unit.matrix)
        self.pull = torch.zeros_like(dense)
        self.sparse = dense
        self._choose()

    def step(self, upper: Tensor, penalty: float) -> None:
        """Move B, D and V once; `upper` [cols, cols] is U with (H + rho I)^-1 = U^T U."""
        wanted = (self.image - self.pull).add_(self.sparse, alpha=penalty)
        full = torch.empty_like(wanted)
        times_upper(times_upper_transposed(wanted, upper), upper, into=full)
        torch.add(full, self.pull, alpha=1 / penalty, out=self.sparse)
        self._choose()
        self.pull.add_(full, alpha=penalty).sub_(self.sparse, alpha=penalty)

    def _choose(self) -> None:
        """Zero the smallest entries of D."""
        target = self._target
        self.mask = target.pattern.mask(self.sparse.abs(), target.sparsity, per_row=False)
        self.sparse.masked_fill_(self.mask, 0)

    def solution(self, unit: UnitGram, damping: float) -> Solution:
        """Return the weight that is fitted on D's support."""
        del self.pull
        fitted = descend(self.sparse, self.image, self.mask | unit.dead, unit, SUPPORT_STEPS)
        return Solution(
            fitted.div_(unit.norms),
            self.mask,
            damping=damping,
            iterations=len(PENALTIES) * PER_PENALTY,
            refit_steps=SUPPORT_STEPS,
        )
