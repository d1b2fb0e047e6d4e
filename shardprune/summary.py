"""The table at the end of a run."""

from rich.table import Table

from shardprune.result import Result


def summary(result: Result) -> Table:
    """Perplexity, sparsity, size, seconds and memory of a run."""
    recipe = result.recipe
    table = Table(title=f"{recipe['method']} {recipe['pattern']}, {recipe['out']}", title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for source, measured in result.perplexity.items():
        after = f"{measured.after:.3f}" if measured.after is not None else "-"
        table.add_row(f"perplexity, {source.rsplit('/', 1)[-1]}", f"{measured.before:.3f}", after)
    table.add_row("sparsity", f"{result.sparsity.before:.4f}", f"{result.sparsity.achieved:.4f}")
    table.add_row("parameters", f"{result.model.parameters_before:,}", f"{result.model.parameters_after:,}")
    for phase in ("observe", "prune", "evaluate", "total"):
        if phase in result.seconds:
            table.add_row(f"seconds, {phase}", "", f"{result.seconds[phase]:.1f}")
    table.add_row("workers", "", str(len(result.workers)))
    peak = max((worker.peak_bytes for worker in result.workers), default=0)
    table.add_row("peak memory of a worker", "", f"{peak / 2**20:,.0f} MiB")
    if result.restarts:
        table.add_row("restarts", "", str(result.restarts))
    return table
