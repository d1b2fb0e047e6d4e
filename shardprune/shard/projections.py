"""One projection from its dense weight to the pruned one that is written, with its report."""

from typing import Any

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import Method
from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.statistics import InputStatistics

# layer, name, target, zeros, zeros_before, weights, error, retries, damping, outliers, pattern
Report = dict[str, Any]


def prune_projection(
    method: Method,
    dense: Tensor,
    stored: torch.dtype,
    statistics: InputStatistics | None,
    pattern: Pattern,
    share: Share,
    restore: bool,
    label: str,
) -> tuple[Tensor, Report]:
    """Prune a weight [rows, cols] and round it to the dtype that the checkpoint stores.

    Args:
        restore: put the dense values back where the method left weights.

    Returns the weight and its report: the requested fraction of zeros, their number counted on the rounded
    weight, and the retries of the solver.

    Raises:
        SolverError: names the projection.
    """
    weight = dense.float()
    if statistics is not None and not statistics.finite:
        raise SolverError(f"{label}: its inputs are not finite: the activations overflow")
    try:
        solution = method.prune(weight, statistics, pattern, share.sparsity)  # type: ignore[arg-type]
    except SolverError as error:
        raise SolverError(f"{label}: {error}") from error
    if not bool(torch.isfinite(solution.weight).all()):
        raise SolverError(f"{label}: the pruned weight is not finite")
    pruned = (weight.masked_fill(solution.mask, 0) if restore else solution.weight).to(stored)

    rows, cols = weight.shape
    expected = pattern.zeros(rows, cols, share.sparsity)
    report = _report(weight, pruned, share.sparsity, pattern, label)
    assert int(solution.mask.sum()) == expected <= report["zeros"], f"{label}: {report['zeros']} zeros, not {expected}"
    report["retries"] = solution.retries
    if solution.damping is not None:
        report["damping"] = solution.damping
    if share.outliers is not None:
        report["outliers"] = share.outliers
    return pruned, report


def adopt_projection(
    dense: Tensor, given: Tensor, stored: torch.dtype, pattern: Pattern, restore: bool, label: str
) -> tuple[Tensor, Report]:
    """The weight [rows, cols] that another tool pruned, rounded to the dtype that the dense checkpoint stores.

    Args:
        restore: take its zeros only, and the dense values elsewhere.

    Raises:
        SolverError: names the projection.
    """
    if not bool(torch.isfinite(given).all()):
        raise SolverError(f"{label}: the sparse weight is not finite")
    pruned = (dense.masked_fill(given == 0, 0) if restore else given).to(stored)
    target = int((pruned == 0).sum()) / pruned.numel()
    return pruned, _report(given, pruned, target, pattern, label)


def _report(before: Tensor, pruned: Tensor, target: float, pattern: Pattern, label: str) -> Report:
    assert pattern.holds(pruned), f"{label}: the zeros break the pattern {pattern}"
    zeros = int((pruned == 0).sum())
    report: Report = {
        "target": target,
        "zeros": zeros,
        "zeros_before": int((before == 0).sum()),
        "weights": before.numel(),
    }
    if isinstance(pattern, NM):
        report["pattern"] = str(pattern)
    return report
