"""Writing the report of a run, and the comparison of several."""

from collections.abc import Iterator
from typing import Any

from shardprune.errors import InputError
from shardprune.report.page.comparison import HEADINGS, NUMBERS, comparison_rows, comparisons, names_of, points_of
from shardprune.report.page.comparison_data import as_csv, as_json, is_generated
from shardprune.report.page.experts_map import experts_map, lost_weight
from shardprune.report.page.finished_run import FinishedRun, all_unfinished, finished_runs, unfinished_runs
from shardprune.report.page.heat_maps import even_sparsity, outlier_map, sparsity_map
from shardprune.report.page.history import History
from shardprune.report.page.memory import memory_of_workers
from shardprune.report.page.mop_path import path_of_search
from shardprune.report.page.output_errors import block_errors, improvement_errors, narrowing_errors, projection_errors
from shardprune.report.page.place import FILE, place_of_report
from shardprune.report.page.plot import Plot
from shardprune.report.page.render import Grid, Section, render
from shardprune.report.page.timeline import timeline
from shardprune.report.page.training import loss_curve
from shardprune.report.result import Evaluation, EvaluationResult, Result
from shardprune.report.summary import (
    EVALUATION_HEADINGS,
    REMOVED_OR_ZERO,
    evaluation_rows,
    remark_on_numbers,
    summary_rows,
    what_was_done,
)
from shardprune.report.verdict import verdict
from shardprune.storage.folder import Folder, output_folder
from shardprune.storage.locations import absolute
from shardprune.storage.retrying import preflight
from shardprune.storage.yaml_file import dump_yaml

GENERATED = b'<meta name="generator" content="shardprune">'


@preflight()
def write_report(out: str) -> str:
    """Write the report of a run's or a pipeline's output into it; return its location.

    Raises:
        InputError: the output holds no finished run, or cannot be read or written.
    """
    write_page(absolute(out))
    return place_of_report(out)


def write_page(out: str) -> None:
    """Write the report of an output, an absolute path or URL, into it."""
    folder = output_folder(out)
    runs = finished_runs(folder.url)
    folder.write_text(FILE, render(_title(runs), [_section(run) for run in runs]))


@preflight()
def write_comparison(outs: list[str], file: str) -> tuple[str, list[str], list[str]]:
    """Write a page that compares the perplexities of several outputs, and its numbers beside it as JSON and CSV; return
    its location, and what it lacks: the runs that are not finished, and those without a perplexity.

    Raises:
        InputError: there are fewer than two, one holds no run that made a model, none is finished, the file or
            one beside it holds something else, or something cannot be read or written.
    """
    outs = list({absolute(out).rstrip("/"): out for out in outs}.values())
    if len(outs) < 2:
        raise InputError("compare", f"{', '.join(outs)!r} is one output; give two or more")
    unfinished = [name for out in outs for name in unfinished_runs(absolute(out))]
    runs = [finished_runs(absolute(out)) for out in outs if not all_unfinished(absolute(out))]
    names = names_of(run.folder for of_one in runs for run in of_one)
    points = [point for of_one in runs for point in points_of(of_one, names)]
    if not points:
        lacking = f"; not finished: {', '.join(unfinished)}" if unfinished else ""
        reason = "none of the runs measured a perplexity; give --eval, or `shardprune evaluate`"
        raise InputError("compare", f"{reason}{lacking}")
    there = {point.name for point in points}
    unmeasured = [names[run.folder] for of_one in runs for run in of_one if names[run.folder] not in there]
    grid = Grid(HEADINGS, comparison_rows(points), NUMBERS, sortable=True)
    place = absolute(file)
    where, _, name = place.rpartition("/")
    if not name.endswith(".html"):
        raise InputError("file", f"{file!r} does not end in .html")
    folder = Folder(where or "/", "file")
    if folder.size(name) and GENERATED not in folder.read_bytes(name):
        raise InputError("file", f"{file!r} exists and is no report; remove it or choose another name")
    stem = name.removesuffix(".html")
    data = {f"{stem}.json": as_json(points), f"{stem}.csv": as_csv(points)}
    for beside in data:
        if folder.size(beside) and not is_generated(beside, folder.read_bytes(beside)):
            reason = f"{beside!r}, for its numbers, exists and is not of a comparison; remove it or choose another name"
            raise InputError("file", f"{file!r}: {reason}")
    remarks = [f"The same numbers, unrounded, lie beside this page: {', '.join(data)}."]
    remarks += [f"Not finished, and therefore not on this page: {', '.join(unfinished)}."] if unfinished else []
    if unmeasured:
        remarks.append(f"Without a perplexity (--eval), and therefore not on this page: {', '.join(unmeasured)}.")
    section = Section("Perplexity, compression, time", grids=[grid], plots=comparisons(points), remarks=remarks)
    page = render(f"{len(outs)} runs compared", [section])
    for beside, text in data.items():
        folder.write_text(beside, text)
    folder.write_text(name, page)
    return place, unfinished, unmeasured


def _title(runs: list[FinishedRun]) -> str:
    return f"{runs[0].model.rstrip('/').rsplit('/', 1)[-1]}: {', '.join(run.command for run in runs)}"


def _section(run: FinishedRun) -> Section:
    recipe = dump_yaml(run.result.recipe)
    repeated = f"shardprune {run.command} --recipe recipe.yaml --out ../again"
    if isinstance(run.result, EvaluationResult):
        grids = [*_evaluation_grids(run.result.evaluation)]
        remarks = [*_remark_on_numbers(run.result), *run.circumstances]
        return Section("evaluate", _costs(run), grids, _work(run), remarks, recipe, repeat=repeated)
    result = run.result
    grids = [Grid(("", "before", "after"), list(summary_rows(result, run.attempts)))]
    if result.evaluation:
        grids += _evaluation_grids(result.evaluation)
    plots = [plot for plot in plots_of(result) if plot]
    return Section(
        ", ".join((result.command, *what_was_done(result))),
        _facts(run, result),
        grids,
        [*plots, *_work(run)],
        [*_remarks(result), *run.circumstances],
        recipe,
        verdict(result),
        repeated,
    )


def _facts(run: FinishedRun, result: Result) -> list[tuple[str, str]]:
    """Return what the table of what was counted and measured does not say."""
    facts = [("model", run.model), ("output", run.name)]
    if result.sparsity and not result.recovery:  # recover has no target
        name = "sparsity" if result.sparsity.left_zero is None else REMOVED_OR_ZERO
        facts.append((f"{name}: target", f"{result.sparsity.target:.2%}"))
    elif result.structure and result.recipe.get("remove") is not None:
        facts.append(("parameters to remove: target", f"{result.recipe['remove']:.2%}"))
    if result.model.removed:
        facts.append(("parameters removed", f"{result.model.removed:.4%}"))
    if run.attempts > 1:
        facts.append(_time(run))
    if (nodes := _nodes(run)) > 1:
        facts.append(("nodes", str(nodes)))
    return facts


def _costs(run: FinishedRun) -> list[tuple[str, str]]:
    """Return what an evaluation took, which has no such table."""
    nodes = _nodes(run)
    return [
        _time(run),
        ("workers", f"{len(run.result.workers)} on {nodes} node{'s' if nodes != 1 else ''}"),
        ("restarts", str(run.result.restarts)),
    ]


def _time(run: FinishedRun) -> tuple[str, str]:
    return "time" if run.attempts == 1 else f"time, {run.attempts} attempts", f"{run.seconds:,.1f} s"


def _nodes(run: FinishedRun) -> int:
    return len({worker.node for worker in run.result.workers})


def _evaluation_grids(evaluation: Evaluation) -> Iterator[Grid]:
    """Yield the tables of what was measured, and of what the models write."""
    yield Grid(EVALUATION_HEADINGS, list(evaluation_rows(evaluation)), numbers=2)
    if evaluation.latency and evaluation.latency.continuations:
        texts, models = evaluation.latency.continuations, evaluation.latency.weights
        other = next((name for name in models if name != "pruned"), "dense")
        rows: list[tuple[str, ...]] = [(text.prompt, text.before or "-", text.after) for text in texts]
        yield Grid(("prompt", f"{other}, greedily", "pruned, greedily"), rows, numbers=3)


def plots_of(result: Result) -> list[Plot | None]:
    """Return the plots of what a run did to the model; None in the place of those for which there is nothing."""
    plots: list[Plot | None] = []
    if result.sparsity and result.sparsity.projections:
        plots += [sparsity_map(result.sparsity), outlier_map(result.sparsity)]
        plots.append(projection_errors(result.sparsity.projections))
        plots.append(block_errors(result.sparsity.blocks or ()))
    plots.append(improvement_errors(result.improvements))
    if result.structure:
        plots.append(narrowing_errors(result.structure.layers or ()))
        if result.structure.path:
            plots.append(path_of_search(result.structure.path, result.recipe))
    if result.experts:
        plots += [experts_map(result.experts), lost_weight(result.experts)]
    if result.recovery:
        plots.append(loss_curve(result.recovery))
    return plots


def _work(run: FinishedRun) -> list[Plot]:
    """Return the plots of the workers' time and memory."""
    plots = [memory_of_workers(run.result.workers)] if run.result.workers else []
    if run.events:
        trainers = [(worker.shard, worker.replica) for worker in run.result.workers]
        history = History(run.events, trainers if run.command == "recover" else ())
        plots.append(timeline(history))
    return plots


def _remark_on_numbers(result: Result | EvaluationResult) -> list[str]:
    remark = remark_on_numbers(result)
    return [remark] if remark else []


def _remarks(result: Result) -> list[str]:
    """Return the reasons why parts of a report are missing."""
    remarks = _remark_on_numbers(result)
    zeroed: dict[str, Any] = result.recipe if "method" in result.recipe and result.sparsity else {}
    if result.sparsity and result.sparsity.projections and (alike := even_sparsity(result.sparsity)):
        remarks.append(f"Sparsity has no map: it is {alike}% in every layer and projection.")
    if zeroed and result.sparsity and result.sparsity.projections:
        if all(layer.outliers is None for layer in result.sparsity.layers):
            remarks.append(
                f"Outlier ratios were not measured: allocation {zeroed['allocation']} does not need them (owl and "
                "mosaic do)."
            )
        if all(entry.error is None for entry in result.sparsity.projections):
            remarks.append("Output errors were not measured (--no-measure-error).")
    if not result.perplexity:
        remarks.append("Perplexity was not measured (--eval).")
    return remarks
