"""Relative output errors of projections and blocks."""

import math
from collections.abc import Iterable

import plotly.graph_objects as go

from shardprune.report.page.plot import Plot, figure, series
from shardprune.report.result import BlockResult, ImprovementResult, NarrowedLayer, ProjectionResult

TICKS = 12  # of the axis of layers, at most
STEPS = (1, 2, 5, 10, 20, 50, 100)

Point = tuple[int, str, float]  # layer, series, error


def projection_errors(projections: Iterable[ProjectionResult]) -> Plot | None:
    """Plot the relative output error of every projection; None if it was not measured."""
    points = [(entry.layer, entry.name, entry.error) for entry in projections if entry.error is not None]
    return _errors(
        points,
        "Output error by layer (relative, no unit)",
        "‖XW − XW′‖² / ‖XW‖² of each projection on the calibration data: the share of its output's energy that "
        "pruning changed, by the original number of the layer.",
    )


def narrowing_errors(layers: Iterable[NarrowedLayer]) -> Plot | None:
    """Plot the relative output error of the output projections of narrowed layers; None if it was not measured."""
    points = [(layer.layer, name, error) for layer in layers for name, error in layer.errors.items()]
    return _errors(
        points,
        "Output error of narrowed blocks by layer (relative, no unit)",
        "‖XW − X′W′‖² / ‖XW‖² of the output projections whose inputs were removed, on the calibration data.",
    )


def block_errors(blocks: Iterable[BlockResult]) -> Plot | None:
    """Plot the relative output error of blocks before and after their masks were rebuilt; None if it was not
    measured.
    """
    points = []
    for block in blocks:
        for when, error in (("before", block.error_before), ("after", block.error_after)):
            if error is not None:
                points.append((block.layer, f"{block.block}, {when}", error))
    return _errors(
        points,
        "Error of rebuilt blocks by layer (relative, no unit)",
        "‖dense − sparse‖² / ‖dense‖² of the output of each block on the calibration data, before and after its masks "
        "were rebuilt.",
    )


def improvement_errors(improvements: Iterable[ImprovementResult]) -> Plot | None:
    """Plot the output error of every layer on held-out windows before and after the last step that was meant to improve
    it.
    """
    points: dict[tuple[int, str], float] = {}
    for step in improvements:
        points[step.layer, f"{step.step}, before"] = step.error_before
        points[step.layer, f"{step.step}, after"] = step.error_after if step.kept else step.error_before
    return _errors(
        [(layer, name, error) for (layer, name), error in points.items() if math.isfinite(error)],
        "Error of layers on held-out windows (relative, no unit)",
        "‖output − dense output‖² / ‖dense output − dense input‖² of each layer before and after the last step of a "
        "kind that was meant to improve it, as it was kept or undone.",
    )


def _errors(points: list[Point], title: str, text: str) -> Plot | None:
    if not points:
        return None
    traces = []
    for place, name in enumerate(dict.fromkeys(name for _, name, _ in points)):
        own = [(layer, error) for layer, of, error in points if of == name]
        traces.append(
            go.Scatter(
                x=[layer for layer, _ in own],
                y=[error for _, error in own],
                name=name,
                mode="lines+markers",
                hovertemplate="layer %{x}: %{y:.3g}",
                **series(place),
            )
        )
    layers = 1 + max(layer for layer, _, _ in points)
    drawn = figure(
        traces,
        xaxis={"title": "layer", "dtick": next(step for step in STEPS if step * TICKS >= layers)},
        yaxis_title="relative error",
    )
    if all(
        error > 0 for _, _, error in points
    ):  # a projection without pruned weights has error 0, which a log axis cannot show
        drawn.update_yaxes(type="log", tickvals=_ticks([error for _, _, error in points]), tickformat="~g")
    return Plot(title, drawn, text)


def _ticks(errors: list[float]) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten around some positive numbers; over more than three powers, 1 times
    only.
    """
    powers = range(math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors))) + 1)
    return [digit * 10.0**power for power in powers for digit in ((1, 2, 5) if len(powers) <= 4 else (1,))]
