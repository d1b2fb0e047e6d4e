"""Comparison of several runs: perplexity against compression and against seconds."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import plotly.graph_objects as go

from shardprune.errors import InputError, without_credentials
from shardprune.report.page.finished_run import FinishedRun
from shardprune.report.page.plot import COLORS, SYMBOLS, Plot, figure
from shardprune.report.result import EvaluationResult, Result
from shardprune.storage.output_names import PRUNED, RECOVERED

HEADINGS = ("", "run", "text", "perplexity", "compression", "seconds")


@dataclass(frozen=True)
class Text:
    """The text that a perplexity was measured on; measurements are comparable only if all fields but the name that it
    was given are equal."""

    source: str = field(compare=False)
    seqlen: int
    windows: int
    tokens_sha256: str

    @property
    def name(self) -> str:
        return f"{self.source.rsplit('/', 1)[-1]}, {self.windows:,} x {self.seqlen:,} tokens"


@dataclass(frozen=True)
class Point:
    """One model in the comparison: `compression` is the removed or zero share of the original's parameters, `seconds`
    the time of all its runs together.
    """

    name: str
    text: Text
    perplexity: float
    compression: float
    seconds: float


def names_of(folders: Iterable[str]) -> dict[str, str]:
    """Return the shortest tails of the folders' paths that tell them apart, of a pipeline's step at least two parts."""
    parts = {folder: without_credentials(folder).rstrip("/").split("/") for folder in folders}
    names = {}
    for folder, own in parts.items():
        others = [of for other, of in parts.items() if other != folder]
        count = 2 if own[-1] in (PRUNED, RECOVERED) else 1
        while count < len(own) and any(of[-count:] == own[-count:] for of in others):
            count += 1
        names[folder] = "/".join(own[-count:]).lstrip("/")
    return names


def points_of(runs: list[FinishedRun], names: dict[str, str]) -> list[Point]:
    """Return the models that runs made, and the originals that they started from.

    Args:
        runs: one, or the steps of a pipeline, in order.
        names: labels of their outputs.

    Raises:
        InputError: a run was only an evaluation.
    """
    points = []
    lineage = _lineage(runs)
    for run in runs:
        if run not in lineage:
            raise InputError("compare", f"{run.folder} holds only an evaluation; give outputs that hold a model")
    original, seconds = lineage[0], 0.0
    assert isinstance(original.result, Result)
    if _was_dense(original.result):
        for source, measured in original.result.perplexity.items():
            text = Text(source, measured.seqlen, measured.windows, measured.tokens_sha256)
            points.append(Point(original.model.rstrip("/").rsplit("/", 1)[-1], text, measured.before, 0.0, 0.0))
    for run in lineage:
        assert isinstance(run.result, Result)
        seconds += run.seconds
        if run in runs:
            left = run.result.model.parameters_after - _zeros(run)
            compression = 1 - left / original.result.model.parameters_before
            name = names[run.folder]
            points += [Point(name, text, value, compression, seconds) for text, value in _measured(run.result)]
    return points


def _was_dense(result: Result) -> bool:
    """Return whether the model measured before a run was dense."""
    return result.command != "rebuild" and not (result.sparsity and result.sparsity.before)


def _zeros(run: FinishedRun) -> int:
    """Return the zeros of a run's model; runs of mop that only remove structures do not count them."""
    assert isinstance(run.result, Result)
    if run.result.model.zeros_after is None and run.result.sparsity is not None:
        raise InputError("compare", f"{run.folder} was written before zeros were counted; start its command again")
    return run.result.model.zeros_after or 0


def _lineage(runs: list[FinishedRun]) -> list[FinishedRun]:
    """Prepend the runs that made the runs' input models, as far as they are known."""
    found = [run for run in runs if not isinstance(run.result, EvaluationResult)]
    while found and (parent := found[0].parent) and parent.folder not in {run.folder for run in found}:
        found.insert(0, parent)  # no run is its own parent, even if an output was moved to its model's location
    return found


def _measured(result: Result) -> list[tuple[Text, float]]:
    """Return all perplexities of a run's model: the run's own and those of later evaluations."""
    found: dict[Text, float] = {}
    for source, measured in result.perplexity.items():
        if measured.after is not None:
            found[Text(source, measured.seqlen, measured.windows, measured.tokens_sha256)] = measured.after
    for source, later in (result.evaluation.perplexity if result.evaluation else {}).items():
        found.setdefault(Text(source, later.seqlen, later.windows, later.tokens_sha256), later.value)
    return list(found.items())


def comparisons(points: list[Point]) -> list[Plot]:
    """Return two plots per text: perplexity against compression and against seconds."""
    plots = []
    names = list(dict.fromkeys(point.name for point in points))
    for text in dict.fromkeys(point.text for point in points):
        own = list(dict.fromkeys(point for point in points if point.text == text))
        plots.append(
            Plot(
                f"Perplexity on {text.name} against compression (% of the original's parameters)",
                _scatter(own, names, [100 * point.compression for point in own], "compression (%)"),
                "The share of the original's parameters that are gone or zero. Down and to the right is better. The "
                "numbers are those of the table.",
            )
        )
        plots.append(
            Plot(
                f"Perplexity on {text.name} against time (s)",
                _scatter(own, names, [point.seconds for point in own], "time (s)"),
                "Wall-clock seconds of all runs that made a model and all their attempts, planning and measuring "
                "included; other machines take other times. The numbers are those of the table.",
            )
        )
    return plots


def _scatter(points: list[Point], names: list[str], x: list[float], title: str) -> go.Figure:
    traces = []
    for point, place in zip(points, x, strict=True):
        number = names.index(point.name)
        traces.append(
            go.Scatter(
                x=[place],
                y=[point.perplexity],
                name=point.name,
                mode="markers+text",
                text=[str(number + 1)],
                textposition="top center",
                cliponaxis=False,
                marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "color": COLORS[number % len(COLORS)], "size": 11},
                hovertemplate="%{y:.3f} at %{x:.4g}<extra>%{fullData.name}</extra>",
            )
        )
    return figure(traces, xaxis_title=title, yaxis_title="perplexity", showlegend=False)


def comparison_rows(points: list[Point]) -> list[tuple[str, ...]]:
    """Return the table of the comparison, with columns HEADINGS and one row per model and text."""
    names = list(dict.fromkeys(point.name for point in points))
    return [
        (
            *(str(names.index(point.name) + 1), point.name, point.text.name),
            *(f"{point.perplexity:.3f}", f"{point.compression:.1%}", f"{point.seconds:,.1f}"),
        )
        for point in dict.fromkeys(points)
    ]
