"""The path of MoP: both candidates of every iteration, and the chosen one."""

from typing import Any

import plotly.graph_objects as go

from shardprune.report.page.plot import COLORS, SYMBOLS, Plot, figure
from shardprune.report.result import Iteration

CANDIDATES = {"L": "a layer goes (L)", "G": "every layer narrower (G)"}


def path_of_search(path: list[Iteration], recipe: dict[str, Any]) -> Plot | None:
    """Plot both candidates' scores in every iteration, the chosen one ringed, and the removed share of parameters.

    None if nothing was scored.
    """
    if not any(entry.scores for entry in path):
        return None
    criterion = "perplexity" if recipe["criterion"] == "random" else recipe["criterion"]
    ticks = [f"{entry.iteration}: {entry.step}<br>{entry.removed:.1%}" for entry in path]
    traces = []
    for place, (step, name) in enumerate(CANDIDATES.items()):
        scored = [(tick, entry.scores[step]) for tick, entry in zip(ticks, path, strict=True) if step in entry.scores]
        if scored:
            traces.append(_points(scored, name, {"symbol": SYMBOLS[place], "color": COLORS[place], "size": 10}))
    chosen = [
        (tick, entry.scores[entry.step.upper()])
        for tick, entry in zip(ticks, path, strict=True)
        if entry.step.upper() in entry.scores
    ]
    ring = {"symbol": "circle-open", "color": COLORS[3], "size": 18, "line": {"width": 2}}
    traces.append(_points(chosen, "what it became", ring))
    drawn = figure(traces, xaxis={"title": "iteration: step, share removed", "type": "category"})
    drawn.update_xaxes(categoryorder="array", categoryarray=ticks)
    drawn.update_yaxes(title=f"score ({criterion})")
    tuned = f" after {steps} steps of tuning" if (steps := recipe.get("tune_candidates")) else ""
    return Plot(
        f"Path of the search (score: {criterion} on the calibration data{tuned})",
        drawn,
        "Each iteration can take a layer away (L) or make every layer narrower (G; g where less than a layer's worth "
        f"was left to remove). {_decision(recipe, criterion)} Under each iteration: what it became, and the share of "
        "all parameters gone by then.",
    )


def _decision(recipe: dict[str, Any], criterion: str) -> str:
    if recipe["path"] is not None:
        return "The path was given; the scores did not decide."
    if recipe["criterion"] == "random":
        return "The path was drawn at random; the scores did not decide."
    return f"The one with the {'higher' if criterion == 'cosine' else 'lower'} score was kept."


def _points(points: list[tuple[str, float]], name: str, marker: dict) -> go.Scatter:
    return go.Scatter(
        x=[tick for tick, _ in points],
        y=[score for _, score in points],
        name=name,
        mode="markers",
        marker=marker,
        hovertemplate="%{y:.4g}",
    )
