"""The projections that read one input, from their dense weights to the pruned ones that are written, with reports."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.model.saving import overflow
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.least_squares import fitting
from shardprune.solvers.measured import choose
from shardprune.solvers.methods import DAMPING, DAMPINGS, Damping, Method, Solution, Target
from shardprune.solvers.pattern import NM, Mixed, Pattern
from shardprune.solvers.statistics import InputStatistics, gram_norm
from shardprune.storage.records import ProjectionReport

SOLVED = ("retries", "damping", "sweep", "iterations", "refit_steps")  # fields of a solution that its report has


@dataclass(frozen=True)
class Findings:
    """Facts about one pruned projection, each a tensor [] on its device: the host reads those of all at once.

    Attributes:
        finite: whether all entries of the rounded weight are, and of the solver's where others are restored.
        masked: entries of the mask.
        zeros: those of the rounded weight; `zeros_before` of the dense one.
        broken: groups of N:M with too many weights.
        lost, norm: ||XW - XW'||^2 and ||XW||^2, where the error is measured.
    """

    finite: Tensor
    masked: Tensor
    zeros: Tensor
    zeros_before: Tensor
    broken: Tensor
    lost: Tensor
    norm: Tensor


def prune_projections(
    method: Method,
    weights: Mapping[str, Tensor],
    stored: Mapping[str, torch.dtype],
    statistics: InputStatistics | None,
    pattern: Pattern | Mixed,
    shares: Mapping[str, Share],
    restore: bool,
    measure_error: bool,
    layer: int,
    refitted: bool = False,
    damping: Damping = DAMPING,
    aims: Mapping[str, Tensor] | None = None,
) -> list[ProjectionReport]:
    """Prune the projections that read one input, in place.

    Args:
        weights: those of the layer by name, [rows, cols], dense.
        stored: the dtypes of the checkpoint, to which pruned weights are rounded.
        restore: put the dense values back where the method left weights.
        measure_error: report the output errors, which takes statistics of kind `gram`.
        refitted: fit the kept weights to the dense outputs, which takes the same statistics; those of projections for
            which it is better by the statistics of held-out windows, where there are any.
        damping: of Gram matrices; `auto` takes statistics with those of held-out windows, and finds it for each.
        aims: weights that the method prunes in the place of the dense ones, float32 [rows, cols]; errors are those
            against the dense ones nevertheless.

    Returns the reports, with the zeros counted on the rounded weights.

    Raises:
        SolverError: names the projection.
    """
    patterns = {name: pattern.at(shares[name].sparsity) for name in weights}
    pruned_from = aims or weights
    tried = DAMPINGS if damping == "auto" else (damping,)
    targets = [Target(pruned_from[name], patterns[name], shares[name].sparsity, tried[0], refitted) for name in weights]
    labels = {name: f"layer {layer} {name}" for name in weights}
    names = list(weights)
    if statistics is not None and not statistics.finite:
        raise SolverError(f"{labels[names[0]]}: its inputs are not finite: the activations overflow")
    if statistics is not None:
        statistics.settle()
    gram = statistics.sums if statistics is not None and measure_error else None
    solutions, found = [], []
    if statistics is not None and statistics.held_out is not None:
        try:
            targets = choose(method, targets, statistics, tried)
            statistics.take_in_held_out()
        except SolverError as error:
            raise SolverError(f"{labels[names[0]]}: {error}") from error
    solving = (fitting(method.solve) if refitted else method.solve)(targets, statistics)
    for name, weight in weights.items():
        try:
            solution = next(solving)
        except SolverError as error:
            raise SolverError(f"{labels[name]}: {error}") from error
        pruned = (weight.masked_fill(solution.mask, 0) if restore else solution.weight).to(stored[name])
        known = solution if aims is None else replace(solution, lost=None)  # which is against what was pruned
        found.append(_findings(weight, known, pruned, patterns[name], restore, gram))
        solutions.append({name: getattr(solution, name) for name in SOLVED})
        weight.copy_(pruned)
        del solution, pruned

    reports = []
    for name, facts, solved_by in zip(names, _read(found), solutions, strict=True):
        rows, cols = weights[name].shape
        expected = patterns[name].zeros(rows, cols, shares[name].sparsity)
        finite, masked, zeros, zeros_before, broken, lost, norm = facts
        if not finite:
            raise SolverError(f"{labels[name]}: {overflow('pruned weight', stored[name])}")
        if not math.isfinite(lost):
            raise SolverError(
                f"{labels[name]}: what its outputs lose is not finite: the weights that were found overflow"
            )
        # Rounding to 16 bits may add zeros to those of the mask, never take one away.
        assert int(masked) == expected <= int(zeros), f"{labels[name]}: {int(zeros)} zeros, not {expected}"
        assert not broken, f"{labels[name]}: the zeros break the pattern {patterns[name]}"
        reports.append(
            ProjectionReport(
                layer,
                name,
                target=shares[name].sparsity,
                zeros=int(zeros),
                zeros_before=int(zeros_before),
                weights=rows * cols,
                pattern=_named(patterns[name]),
                **solved_by,
                outliers=shares[name].outliers,
                error=None if gram is None else (lost / norm if norm > 0 else 0.0),
            )
        )
    return reports


def _findings(
    dense: Tensor, solution: Solution, pruned: Tensor, pattern: Pattern, restored: bool, gram: Tensor | None
) -> Findings:
    """Return what there is to know of a projection; `pruned` is its rounded weight, with dense values where the method
    left weights if it is `restored`."""
    lost = norm = dense.new_zeros((), dtype=torch.float64)
    if gram is not None:
        norm = gram_norm(dense.float(), gram)
        if solution.lost is None:
            lost = gram_norm(dense.float() - pruned, gram)
        else:
            lost = solution.lost
            if pruned.dtype != torch.float32:
                # Roundings of different weights are independent: those of one output add up like their squares.
                rounding = torch.linalg.vector_norm(solution.weight - pruned, dim=0).square_()
                lost = lost + (rounding * gram.diagonal()).sum(dtype=torch.float64)
    return Findings(
        finite=_finite(pruned) & _finite(solution.weight) if restored else _finite(pruned),
        masked=solution.mask.count_nonzero(),
        zeros=pruned.numel() - pruned.count_nonzero(),
        zeros_before=dense.numel() - dense.count_nonzero(),
        broken=pattern.broken(pruned),
        lost=lost,
        norm=norm,
    )


def _finite(weight: Tensor) -> Tensor:
    """Return whether all entries are, bool []: by their extremes, which a NaN replaces, in one pass."""
    return torch.stack(weight.aminmax()).isfinite().all()


def _read(found: list[Findings]) -> list[list[float]]:
    """Return the findings as numbers, in one look at the device; counts are exact below 2^53."""
    return torch.stack([torch.stack([fact.double() for fact in vars(facts).values()]) for facts in found]).tolist()


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
    if not bool(torch.isfinite(pruned).all()):
        raise SolverError(f"{label}: {overflow('sparse weight', stored)}")
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
