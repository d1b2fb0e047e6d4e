"""One projection from its dense weight to the pruned one that is written, with its report."""

from typing import Any

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.solvers.method import Method
from shardprune.solvers.pattern import Pattern
from shardprune.solvers.statistics import InputStatistics, output_error

Report = dict[str, Any]  # layer, name, target, achieved, zeros, zeros_before, weights, error, retries, damping


def prune_projection(
    method: Method,
    dense: Tensor,
    stored: torch.dtype,
    statistics: InputStatistics | None,
    pattern: Pattern,
    sparsity: float,
    label: str,
) -> tuple[Tensor, Report]:
    """Prune a weight [rows, cols] and round it to the dtype that the checkpoint stores.

    Returns the weight and its report: the requested and the achieved fraction of zeros, counted on the
    rounded weight; the relative output error where the statistics know it; the retries of the solver.

    Raises:
        SolverError: names the projection.
    """
    weight = dense.float()
    if statistics is not None and not statistics.finite:
        raise SolverError(f"{label}: its inputs are not finite: the activations overflow")
    try:
        solution = method.prune(weight, statistics, pattern, sparsity)  # type: ignore[arg-type]
    except SolverError as error:
        raise SolverError(f"{label}: {error}") from error
    if not bool(torch.isfinite(solution.weight).all()):
        raise SolverError(f"{label}: the pruned weight is not finite")
    pruned = solution.weight.to(stored)

    zeros = int((pruned == 0).sum())
    rows, cols = weight.shape
    expected = pattern.zeros(rows, cols, sparsity)
    assert int(solution.mask.sum()) == expected <= zeros, f"{label}: {zeros} zeros instead of {expected}"
    assert pattern.holds(pruned), f"{label}: the zeros break the pattern {pattern}"

    report: Report = {
        "target": sparsity,
        "achieved": zeros / weight.numel(),
        "zeros": zeros,
        "zeros_before": int((weight == 0).sum()),
        "weights": weight.numel(),
        "retries": solution.retries,
    }
    if solution.damping is not None:
        report["damping"] = solution.damping
    if statistics is not None and statistics.kind == "gram":
        report["error"] = output_error(weight, pruned.float(), statistics)
    return pruned, report
