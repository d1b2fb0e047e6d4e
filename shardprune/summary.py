"""The table at the end of a run."""

from rich.table import Table

from shardprune.result import EvaluationResult, Recovery, Result, Sparsity

LABELS = {"layers": "layers", "groups": "key/value groups of a layer", "neurons": "neurons of a layer"}


def summary(result: Result) -> Table:
    """Perplexity, sparsity, size, seconds and memory of a run."""
    table = Table(title=_title(result), title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for source, measured in result.perplexity.items():
        after = f"{measured.after:.3f}" if measured.after is not None else "-"
        table.add_row(f"perplexity, {source.rsplit('/', 1)[-1]}", f"{measured.before:.3f}", after)
    if result.sparsity:
        _add_sparsity(table, result.sparsity)
    if result.recovery:
        _add_recovery(table, result.recovery)
    if result.structure:
        shapes = result.structure.before, result.structure.after
        for name in ("layers", "groups", "neurons"):
            counts = [getattr(shape, name) for shape in shapes]
            if counts[0] != counts[1]:
                table.add_row(LABELS[name], *(f"{count:,}" for count in counts))
    table.add_row("parameters", f"{result.model.parameters_before:,}", f"{result.model.parameters_after:,}")
    for phase in ("structure", "search", "observe", "prune", "recover", "evaluate", "total"):
        if phase in result.seconds:
            table.add_row(f"seconds, {phase}", "", f"{result.seconds[phase]:.1f}")
    table.add_row("workers", "", str(len(result.workers)))
    peak = max((worker.peak_bytes for worker in result.workers), default=0)
    table.add_row("peak memory of a worker", "", f"{peak / 2**20:,.0f} MiB")
    if result.restarts:
        table.add_row("restarts", "", str(result.restarts))
    return table


def evaluation_summary(result: EvaluationResult) -> Table:
    """Perplexities and the metrics of tasks with their standard errors, those measured earlier included."""
    table = Table(title=result.recipe["model"], title_justify="left")
    table.add_column("", overflow="fold")
    for heading in ("metric", "value", "±", "samples", "shots"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for source, measured in result.evaluation.perplexity.items():
        windows = f"{measured.windows:,} x {measured.seqlen:,}"
        table.add_row(source.rsplit("/", 1)[-1], "perplexity", f"{measured.value:.3f}", "", windows, "")
    for name, task in result.evaluation.tasks.items():
        for metric, found in task.metrics.items():
            stderr = "" if found.stderr is None else f"{found.stderr:.4f}"
            table.add_row(name, metric, f"{found.value:.4f}", stderr, f"{task.samples:,}", str(task.num_fewshot))
            name = ""
    return table


def _title(result: Result) -> str:
    """What was done, and where the result is."""
    recipe = result.recipe
    done = []
    if recipe.get("structured"):
        done.append(f"{recipe['structured']:g} removed by {recipe['score']}")
    if result.command == "mop" and result.structure:
        done.append(f"path {''.join(entry.step for entry in result.structure.path or ())}")
    if "method" in recipe and (result.sparsity is None or result.sparsity.projections):
        done.append(f"{recipe['method']} {recipe['pattern']}")
    if "rebuild_granularity" in recipe and "method" not in recipe:
        done.append(f"rebuilt by {recipe['rebuild_granularity']}")
    return ", ".join((*done, recipe["out"]))


def _add_recovery(table: Table, recovery: Recovery) -> None:
    first, last = recovery.losses[0], recovery.losses[-1]
    table.add_row("training loss", f"{first.loss:.4f}", f"{last.loss:.4f}")
    held_out = [loss.held_out for loss in recovery.losses if loss.held_out is not None]
    if held_out:
        table.add_row("held-out loss, first and last", f"{held_out[0]:.4f}", f"{held_out[-1]:.4f}")
    if recovery.zeros_before:
        table.add_row("zeros of the projections", f"{recovery.zeros_before:,}", f"{recovery.zeros_after:,}")
        table.add_row("zeros that stayed", "", f"{recovery.zeros_kept:,}")
    table.add_row("steps; parameters trained", f"{recovery.steps:,}", f"{recovery.parameters_trained:,}")


def _add_sparsity(table: Table, sparsity: Sparsity) -> None:
    table.add_row("sparsity", f"{sparsity.before:.4f}", f"{sparsity.achieved:.4f}")
    if sparsity.removed is not None and sparsity.zeroed:
        table.add_row("of it removed; zeros", f"{sparsity.removed:.4f}", f"{sparsity.zeroed:.4f}")
    if abs(sparsity.allocated - sparsity.target) > 1e-4:
        table.add_row("sparsity asked for; allocated", f"{sparsity.target:.4f}", f"{sparsity.allocated:.4f}")
    if sparsity.blocks:
        table.add_row("pairs of weights swapped", "", f"{sum(block.swaps for block in sparsity.blocks):,}")
        errors = [
            (block.error_before, block.error_after)
            for block in sparsity.blocks
            if block.error_before is not None and block.error_after is not None
        ]
        if errors:
            means = [sum(pair[place] for pair in errors) / len(errors) for place in (0, 1)]
            table.add_row("error of a block, mean", *(f"{mean:.4f}" for mean in means))
