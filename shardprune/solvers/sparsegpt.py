"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): prune column by column and correct the columns to the right.

From left to right, the columns to the right make up for the value that a pruned column j loses: with H^-1 = U^T U, w_k
-= w_j * (u_jk / u_jj) for every k > j (algorithm 1).

A column's correction has to reach a column to its right only before that column's turn. Columns are therefore taken in
blocks: the steps inside a block come first, then one matrix product corrects all columns behind it for everything that
the block lost. The steps inside a block are one kernel on GPUs (`column_kernel`), a recursion elsewhere.

Projections that read one input are swept together, see `stack`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shardprune.solvers.column_recursion import ColumnRecursion
from shardprune.solvers.factor import Factor
from shardprune.solvers.kernels import kernels_run
from shardprune.solvers.methods import Solution, Sweep, Target
from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.products import add_product
from shardprune.solvers.stack import Stack
from shardprune.solvers.statistics import InputStatistics

if TYPE_CHECKING:
    from shardprune.solvers.column_kernel import ColumnKernel

SUMMED = 2**24  # entries whose squares are taken at once


def prune(weight: Tensor, statistics: InputStatistics, pattern: Pattern, sparsity: float) -> Solution:
    """Prune `weight` [rows, cols] and correct what remains, from statistics of kind `gram`.

    Raises:
        SolverError: the Hessian cannot be factorised.
    """
    return prune_together([Target(weight, pattern, sparsity)], statistics)[0]


def prune_together(targets: Sequence[Target], statistics: InputStatistics) -> list[Solution]:
    """Prune the projections that read one input, those of equal pattern and damping in one sweep; the arguments of
    `prune`.

    Raises:
        SolverError: the Hessian cannot be factorised.
    """
    solutions: dict[int, Solution] = {}
    for pattern, damping in dict.fromkeys((target.pattern, target.damping) for target in targets):
        factor = statistics.factor(damping)
        places = [
            place for place, target in enumerate(targets) if (target.pattern, target.damping) == (pattern, damping)
        ]
        stack = Stack.of([targets[place] for place in places], factor.dead)
        way = _sweep(stack, factor)
        for place, span in zip(places, stack.spans, strict=True):
            weight = stack.columns[:, span].t()
            change = _squared_change(targets[place].weight, weight, factor.dead)
            # The sweep's squares are tr(dW (2/N X^T X + ridge I) dW^T): U factorises the inverse of that matrix.
            lost = (stack.squares[span].sum() - factor.ridge * change).clamp_(min=0) * (max(1, statistics.samples) / 2)
            solutions[place] = Solution(weight, stack.mask[:, span].t(), factor.retries, factor.damping, lost, way)
    return [solutions[place] for place in range(len(targets))]


def _sweep(stack: Stack, factor: Factor) -> Sweep:
    """Prune a stack from left to right; return the way of the steps over columns."""
    way, steps = _steps(stack, factor)
    for left, right in stack.blocks:
        lost = steps.prune_block(left, right)
        if right < len(stack.columns):
            add_product(stack.columns[right:], factor.steps[left:right, right:].t(), lost, alpha=-1)
    return way


def _steps(stack: Stack, factor: Factor) -> "tuple[Sweep, ColumnKernel | ColumnRecursion]":
    """Return the steps over columns where the stack is."""
    if kernels_run(stack.columns.device):
        from shardprune.solvers import column_kernel  # which imports Triton

        if not isinstance(stack.pattern, NM) or stack.pattern.m <= column_kernel.GROUP:
            return "kernel", column_kernel.ColumnKernel(stack, factor)
    return "recursion", ColumnRecursion(stack, factor)


def _squared_change(dense: Tensor, pruned: Tensor, dead: Tensor) -> Tensor:
    """Return ||W - W'||^2 over the inputs that are not always zero, float64, for weights [rows, cols]."""
    total = torch.zeros((), dtype=torch.float64, device=dead.device)
    size = max(1, SUMMED // len(dense))
    for before, after, gone in zip(dense.t().split(size), pruned.t().split(size), dead.split(size), strict=True):
        change = (before - after).masked_fill_(gone.unsqueeze(1), 0)
        total += torch.linalg.vector_norm(change, dim=1).double().square_().sum()
    return total
