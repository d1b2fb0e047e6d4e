"""One projection from its dense weight to the pruned one that is written, with its report."""

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import Solver
from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.statistics import InputStatistics
from shardprune.storage.records import ProjectionReport


def prune_projection(
    solver: Solver,
    dense: Tensor,
    stored: torch.dtype,
    statistics: InputStatistics | None,
    pattern: Pattern,
    share: Share,
    restore: bool,
    layer: int,
    name: str,
) -> tuple[Tensor, ProjectionReport]:
    """Prune a weight [rows, cols] and round it to the dtype that the checkpoint stores.

    Args:
        solver: `prune` of the method.
        restore: put the dense values back where the method left weights.

    Returns the weight and its report, with the number of zeros counted on the rounded weight.

    Raises:
        SolverError: names the projection.
    """
    label = f"layer {layer} {name}"
    weight = dense.float()
    if statistics is not None and not statistics.finite:
        raise SolverError(f"{label}: its inputs are not finite: the activations overflow")
    try:
        solution = solver(weight, statistics, pattern, share.sparsity)
    except SolverError as error:
        raise SolverError(f"{label}: {error}") from error
    if not bool(torch.isfinite(solution.weight).all()):
        raise SolverError(f"{label}: the pruned weight is not finite")
    pruned = (weight.masked_fill(solution.mask, 0) if restore else solution.weight).to(stored)

    rows, cols = weight.shape
    expected = pattern.zeros(rows, cols, share.sparsity)
    zeros = int((pruned == 0).sum())
    # Rounding to 16 bits may add zeros to those of the mask, never take one away.
    assert int(solution.mask.sum()) == expected <= zeros, f"{label}: {zeros} zeros, not {expected}"
    assert pattern.holds(pruned), f"{label}: the zeros break the pattern {pattern}"
    report = ProjectionReport(
        layer,
        name,
        target=share.sparsity,
        zeros=zeros,
        zeros_before=int((weight == 0).sum()),
        weights=weight.numel(),
        pattern=_named(pattern),
        retries=solution.retries,
        damping=solution.damping,
        outliers=share.outliers,
    )
    return pruned, report


def adopt_projection(
    dense: Tensor, given: Tensor, stored: torch.dtype, pattern: Pattern, restore: bool, layer: int, name: str
) -> tuple[Tensor, ProjectionReport]:
    """Return the weight [rows, cols] that another tool pruned, rounded to the dtype that the dense checkpoint stores,
    and its report.

    Args:
        restore: take its zeros only, and the dense values elsewhere.

    Raises:
        SolverError: names the projection.
    """
    label = f"layer {layer} {name}"
    if not bool(torch.isfinite(given).all()):
        raise SolverError(f"{label}: the sparse weight is not finite")
    pruned = (dense.masked_fill(given == 0, 0) if restore else given).to(stored)
    assert pattern.holds(pruned), f"{label}: the zeros break the pattern {pattern}"
    zeros = int((pruned == 0).sum())
    report = ProjectionReport(
        layer,
        name,
        target=zeros / pruned.numel(),
        zeros=zeros,
        zeros_before=int((given == 0).sum()),
        weights=given.numel(),
        pattern=_named(pattern),
    )
    return pruned, report


def _named(pattern: Pattern) -> str | None:
    return str(pattern) if isinstance(pattern, NM) else None
