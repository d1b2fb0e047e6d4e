"""Comparison of several runs: perplexity against compression and against seconds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go

from shardprune.errors import InputError, without_credentials
from shardprune.report.page.finished_run import FinishedRun
from shardprune.report.page.plot import COLORS, SYMBOLS, Plot, figure
from shardprune.report.page.tails import shortest_tails
from shardprune.report.result import EvaluationResult, ModelSize, Result
from shardprune.report.summary import what_was_done
from shardprune.report.usual_loss import DENSE
from shardprune.storage.output_names import PRUNED, RECOVERED, is_of_kept

HEADINGS = (
    *("", "run", "method", "text"),
    *("perplexity", "removed", "zero", "size (MB)", "tokens/s, of dense", "tasks", "seconds"),
)
NUMBERS = HEADINGS.index("perplexity")  # the first column of numbers
ACCURACY = "acc"


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
class Product:
    """The model of a run, as far as it was counted and measured: `removed` and `zeroed` are the shares of the
    original's parameters that are gone and that are zero (None where a sparse model lost structures, whose zeros nobody
    counted), `bytes` those of the files of weights, `decode` the tokens
    that it writes in a second in the smallest batch, `of_dense` that as a multiple of the dense model's, measured in
    turn, `accuracy` the mean over the `tasks` that have one.
    """

    method: str = ""
    removed: float = 0.0
    zeroed: float | None = 0.0
    bytes: int | None = None
    decode: float | None = None
    of_dense: float | None = None
    accuracy: float | None = None
    tasks: int = 0


@dataclass(frozen=True)
class Point:
    """One model in the comparison: `compression` is the removed or zero share of the original's parameters, None where
    its zeros are not known, `seconds` the time of all its runs together.
    """

    name: str
    text: Text
    perplexity: float
    compression: float | None
    seconds: float
    product: Product = Product()


def names_of(folders: Iterable[str]) -> dict[str, str]:
    """Return the shortest tails of the folders' paths that tell them apart, of a pipeline's step at least two parts."""
    parts = {folder: without_credentials(folder).rstrip("/").split("/") for folder in folders}
    return {folder: "/".join(tail).lstrip("/") for folder, tail in shortest_tails(parts, _fewest_parts).items()}


def _fewest_parts(parts: Sequence[str]) -> int:
    return 2 if parts[-1] in (PRUNED, RECOVERED) or is_of_kept(parts[-1]) else 1


def points_of(runs: list[FinishedRun], names: dict[str, str]) -> list[Point]:
    """Return the models that runs made, and the originals that they started from.

    Args:
        runs: one, or the steps of a pipeline, in order; those of iterations that mop kept are each a line of their own.
        names: labels of their outputs.

    Raises:
        InputError: a run was only an evaluation.
    """
    kept = [[run] for run in runs if is_of_kept(run.folder)]
    lines = [[run for run in runs if not is_of_kept(run.folder)], *kept]
    return [point for line in lines if line for point in _points_of_line(line, names)]


def _points_of_line(runs: list[FinishedRun], names: dict[str, str]) -> list[Point]:
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
            product = _product(run, lineage[: lineage.index(run) + 1], original.result.model.parameters_before)
            compression = None if product.zeroed is None else product.removed + product.zeroed
            name = names[run.folder]
            points += [Point(name, text, value, compression, seconds, product) for text, value in _measured(run.result)]
    return points


def _product(run: FinishedRun, line: list[FinishedRun], parameters: int) -> Product:
    """Return what a run made, by all runs of its line so far, of so many parameters."""
    assert isinstance(run.result, Result)
    steps = [", ".join((one.command, *what_was_done(one.result))) for one in line if isinstance(one.result, Result)]
    weights = [record.bytes for name, record in run.result.files.items() if name.endswith(".safetensors")]
    zeros = _zeros(line)
    decode = of_dense = None
    found = run.result.evaluation
    if found and found.latency and found.latency.speeds:
        smallest = min(speed.batch for speed in found.latency.speeds)
        rates = {speed.model: speed.decode.median for speed in found.latency.speeds if speed.batch == smallest}
        decode, dense = rates.get("pruned"), rates.get("dense")
        of_dense = decode / dense if decode and dense else None
    tasks = [task for task in found.tasks.values() if not task.group] if found else []
    accuracies = [task.metrics[ACCURACY].value for task in tasks if ACCURACY in task.metrics]
    return Product(
        method=" + ".join(steps),
        removed=1 - run.result.model.parameters_after / parameters,
        zeroed=None if zeros is None else zeros / parameters,
        bytes=sum(weights) if weights else None,
        decode=decode,
        of_dense=of_dense,
        accuracy=sum(accuracies) / len(accuracies) if accuracies else None,
        tasks=len(accuracies),
    )


def _was_dense(result: Result) -> bool:
    """Return whether the model measured before a run was dense: it may have a few zeros by rounding."""
    return result.command != "rebuild" and not (result.sparsity and (result.sparsity.before or 0.0) > DENSE)


def _is_sparse(model: ModelSize) -> bool:
    return (model.zeros_after or 0) > DENSE * model.parameters_after


def _zeros(line: list[FinishedRun]) -> int | None:
    """Return the zeros of the model of the last run of a line. Runs that only remove structures do not count them: of a
    dense model there are none, of a sparse one nobody knows."""
    *before, result = (run.result for run in line if isinstance(run.result, Result))
    if result.model.zeros_after is None and result.sparsity is not None:
        raise InputError("compare", f"{line[-1].folder} was written before zeros were counted; start its command again")
    if result.model.zeros_after is None and any(_is_sparse(earlier.model) for earlier in before):
        return None
    return result.model.zeros_after or 0


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
    """Return two plots per text that several models were measured on: perplexity against compression, and against
    seconds."""
    plots = []
    names = list(dict.fromkeys(point.name for point in points))
    for text in dict.fromkeys(point.text for point in points):
        own = list(dict.fromkeys(point for point in points if point.text == text))
        if len(own) < 2:
            continue
        counted = [(point, 100 * point.compression) for point in own if point.compression is not None]
        plots.append(
            Plot(
                f"Perplexity on {text.name} against compression (% of the original's parameters)",
                _scatter([point for point, _ in counted], names, [share for _, share in counted], "compression (%)"),
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
    """Return the table of the comparison, with columns HEADINGS and one row per model and text; "-" is not measured."""
    names = list(dict.fromkeys(point.name for point in points))
    return [
        (
            *(str(names.index(point.name) + 1), point.name, point.product.method or "-", point.text.name),
            *(f"{point.perplexity:.3f}", f"{point.product.removed:.1%}", _share(point.product.zeroed)),
            *_measured_cells(point.product),
            f"{point.seconds:,.1f}",
        )
        for point in dict.fromkeys(points)
    ]


def _share(fraction: float | None) -> str:
    return "-" if fraction is None else f"{fraction:.1%}"


def _measured_cells(product: Product) -> tuple[str, str, str]:
    size = "-" if product.bytes is None else f"{product.bytes / 1e6:,.1f}"
    of_dense = "" if product.of_dense is None else f", {product.of_dense:.2f} x"
    speed = "-" if product.decode is None else f"{product.decode:,.1f}{of_dense}"
    return size, speed, "-" if product.accuracy is None else f"{product.accuracy:.4f} ({product.tasks})"
