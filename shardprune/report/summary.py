"""The summary of a run in a few rows: the table at its end, and the head of its report."""

from collections.abc import Iterator

from rich.table import Table

from shardprune.model.structure.alignment import degrees
from shardprune.report.experts_result import Experts
from shardprune.report.result import (
    Evaluation,
    EvaluationResult,
    Latency,
    Recovery,
    Result,
    Sparsity,
    Throughput,
    not_finite,
)

LABELS = {"layers": "layers", "groups": "key/value groups of a layer", "neurons": "neurons of a layer"}
NAMED = 4  # numbers in a remark
# The names of shares where structures were removed and weights of the rest made zero.
REMOVED_OR_ZERO = "removed or zero, of the original's weights"
ZERO_OF_REST = "zero, of the weights that are left"
EVALUATION_HEADINGS = ("", "metric", "value", "±", "samples", "shots")

Row = tuple[str, str, str]  # label, before, after


def summary(result: Result) -> Table:
    """Return the table of perplexity, sparsity, size, seconds and memory of a run."""
    table = Table(title=", ".join((*what_was_done(result), result.recipe["out"])), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for row in summary_rows(result):
        table.add_row(*row)
    return table


def evaluation_summary(result: EvaluationResult) -> Table:
    """Return the table of perplexities and of tasks' metrics with standard errors, earlier measurements included."""
    table = Table(title=result.recipe["model"], title_justify="left")
    table.add_column("", overflow="fold")
    for heading in EVALUATION_HEADINGS[1:]:
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for row in evaluation_rows(result.evaluation):
        table.add_row(*row)
    return table


def what_was_done(result: Result) -> list[str]:
    """Describe the steps of a run from its recipe."""
    recipe = result.recipe
    done = []
    if recipe.get("structured"):
        done.append(f"{recipe['structured']:g} removed by {recipe['score']}")
    if result.command == "mop" and result.structure:
        done.append(f"path {''.join(entry.step for entry in result.structure.path or ())}")
    if result.experts:
        merged = ", merged" if result.experts.merged else ""
        done.append(f"{result.experts.after} of {result.experts.before} experts by {result.experts.score}{merged}")
    if "method" in recipe and (result.sparsity is None or result.sparsity.projections):
        done.append(f"{recipe['method']} {recipe['pattern']}")
    if "rebuild_granularity" in recipe and "method" not in recipe:
        done.append(f"rebuilt by {recipe['rebuild_granularity']}")
    return done


def summary_rows(result: Result, attempts: int = 1) -> Iterator[Row]:
    """Yield the rows of counted and measured values.

    Args:
        attempts: of the run, where that is known; the seconds are those of the last one.
    """
    for source, measured in result.perplexity.items():
        after = f"{measured.after:.3f}" if measured.after is not None else "-"
        yield f"perplexity, {source.rsplit('/', 1)[-1]}", f"{measured.before:.3f}", after
    if result.sparsity:
        yield from _sparsity_rows(result.sparsity)
    if result.improvements:
        kept = sum(step.kept for step in result.improvements)
        yield "improving steps kept, of those tried", "", f"{kept} of {len(result.improvements)}"
    if result.recovery:
        yield from _recovery_rows(result.recovery)
    if result.throughput:
        yield from _throughput_rows(result.throughput)
    if result.structure:
        shapes = result.structure.before, result.structure.after
        for name in ("layers", "groups", "neurons"):
            before, after = (getattr(shape, name) for shape in shapes)
            if before != after:
                yield LABELS[name], f"{before:,}", f"{after:,}"
        if shapes[0] != shapes[1]:
            before, after = (", ".join(map(str, degrees(shape.groups, shape.heads, shape.neurons))) for shape in shapes)
            yield "tensor parallelism that it suits", before, after
    if result.experts:
        yield from _expert_rows(result.experts)
    yield "parameters", f"{result.model.parameters_before:,}", f"{result.model.parameters_after:,}"
    for phase in (
        "generate",
        "structure",
        "search",
        "tune",
        "train",
        "curves",
        "observe",
        "remove",
        "prune",
        "recover",
        "evaluate",
        "answers",
        "total",
    ):
        if phase in result.seconds:
            yield (
                f"seconds, {phase}{' of the last attempt' if attempts > 1 else ''}",
                "",
                f"{result.seconds[phase]:.1f}",
            )
    yield "workers", "", str(len(result.workers))
    peak = max((worker.peak_bytes for worker in result.workers), default=0)
    yield "peak memory of a worker", "", f"{peak / 2**20:,.0f} MiB"
    if result.restarts:
        yield "restarts", "", str(result.restarts)


def evaluation_rows(evaluation: Evaluation) -> Iterator[tuple[str, ...]]:
    """Yield the rows under EVALUATION_HEADINGS."""
    for source, measured in evaluation.perplexity.items():
        windows = f"{measured.windows:,} x {measured.seqlen:,}"
        yield source.rsplit("/", 1)[-1], "perplexity", f"{measured.value:.3f}", "", windows, ""
    for source, answers in evaluation.answers.items():
        yield (
            source.rsplit("/", 1)[-1],
            "perplexity of answers",
            f"{answers.value:.3f}",
            "",
            f"{answers.conversations:,}",
            "",
        )
    for name, task in evaluation.tasks.items():
        for metric, found in task.metrics.items():
            stderr = "" if found.stderr is None else f"{found.stderr:.4f}"
            yield name, metric, f"{found.value:.4f}", stderr, f"{task.samples:,}", str(task.num_fewshot)
            name = ""
    if evaluation.latency:
        yield from latency_rows(evaluation.latency)


def latency_rows(latency: Latency) -> Iterator[tuple[str, ...]]:
    """Yield rows under EVALUATION_HEADINGS: sizes, and tokens per second with half of their spread."""
    for name, weights in latency.weights.items():
        yield name, "bytes of the weights", f"{weights.bytes:,}", "", "", ""
    for speed in latency.speeds:
        name = f"{speed.model}, batch {speed.batch} on {latency.device}"
        for kind, rate in (("prefill", speed.prefill), ("decode", speed.decode)):
            half = (rate.most - rate.least) / 2
            yield name, f"{kind}, tokens/s", f"{rate.median:,.1f}", f"{half:,.1f}", str(latency.rounds), ""
            name = ""


def remark_on_numbers(result: Result | EvaluationResult) -> str | None:
    """Say which numbers of a result its file cannot hold; None where there are none."""
    places = not_finite(result)
    more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
    return f"Not finite, and therefore null in result.json: {', '.join(places[:NAMED])}{more}." if places else None


def _throughput_rows(speed: Throughput) -> Iterator[Row]:
    yield "training, tokens/s", "", f"{speed.tokens_per_second:,.0f}"
    whole = speed.seconds["total"] or 1.0
    shares = [f"{name} {value / whole:.0%}" for name, value in speed.seconds.items() if name != "total"]
    yield "of its time", "", ", ".join(shares)
    if speed.utilisation is not None:
        yield "model FLOPs utilisation", "", f"{speed.utilisation:.1%}"


def _recovery_rows(recovery: Recovery) -> Iterator[Row]:
    if recovery.losses:  # gone with the training where an output was made whole again later
        yield "training loss", f"{recovery.losses[0].loss:.4f}", f"{recovery.losses[-1].loss:.4f}"
    held_out = [loss.held_out for loss in recovery.losses if loss.held_out is not None]
    if held_out:
        yield "held-out loss, first and last", f"{held_out[0]:.4f}", f"{held_out[-1]:.4f}"
    if recovery.zeros_before:
        yield "zeros of the projections", f"{recovery.zeros_before:,}", f"{recovery.zeros_after:,}"
        yield "zeros that stayed", "", f"{recovery.zeros_kept:,}"
    yield "steps", "", f"{recovery.steps:,}"
    if recovery.best_step is not None:
        yield "step that was written", "", f"{recovery.best_step:,}"
    yield "parameters trained", "", f"{recovery.parameters_trained:,}"


def _expert_rows(experts: Experts) -> Iterator[Row]:
    yield "experts of a layer", f"{experts.before:,}", f"{experts.after:,}"
    yield "parameters that a token uses", f"{experts.active_before:,}", f"{experts.active_after:,}"
    lost = [layer.lost for layer in experts.layers if layer.lost is not None]
    if lost:
        yield "routing weight lost, mean and largest", "", f"{sum(lost) / len(lost):.2%}, {max(lost):.2%}"
    trained = [training.kept for layer in experts.layers for training in layer.trained]
    if trained:
        yield "trainings of a layer kept, of those tried", "", f"{sum(trained)} of {len(trained)}"


def _sparsity_rows(sparsity: Sparsity) -> Iterator[Row]:
    if sparsity.left_zero is None:
        yield "sparsity", f"{sparsity.before:.4f}", f"{sparsity.achieved:.4f}"
    else:
        yield REMOVED_OR_ZERO, f"{sparsity.before:.4f}", f"{sparsity.achieved:.4f}"
        yield "removed, of the original's weights", "", f"{sparsity.removed:.4f}"
        yield "zero, of the original's weights", "", f"{sparsity.zeroed:.4f}"
        yield ZERO_OF_REST, "", f"{sparsity.left_zero:.4f}"
    if abs(sparsity.allocated - sparsity.target) > 1e-4:
        yield "sparsity asked for", "", f"{sparsity.target:.4f}"
        yield "sparsity allocated", "", f"{sparsity.allocated:.4f}"
    if sparsity.blocks:
        yield "pairs of weights swapped", "", f"{sum(block.swaps for block in sparsity.blocks):,}"
        errors = [
            (block.error_before, block.error_after)
            for block in sparsity.blocks
            if block.error_before is not None and block.error_after is not None
        ]
        if errors:
            before, after = (sum(pair[place] for pair in errors) / len(errors) for place in (0, 1))
            yield "error of a block, mean", f"{before:.4f}", f"{after:.4f}"
