"""Printing of a plan as text."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from shardprune.model.left_dense import left_dense
from shardprune.model.structure.shape import widths_of
from shardprune.planning.chart import LEGEND, idle_share, timeline
from shardprune.planning.choosing import second_shard
from shardprune.planning.plan import Planned, PlanResult
from shardprune.planning.writing import Writing
from shardprune.storage.quantities import duration, gigabytes


def show(result: PlanResult, console: Console) -> None:
    """Print a plan."""
    recipe, model, row = result.recipe, result.model, result.recipe.row
    unit = "GPU" if row.gpu else "worker"
    dtype = str(model.stored).removeprefix("torch.")
    stored = f"stored as FP8, read as {dtype}" if model.in_files < model.stored.itemsize else f"stored as {dtype}"
    console.print(
        f"{model.name}: {model.parameters:,} parameters in {model.layers} layers, {stored}",
        highlight=False,
        soft_wrap=True,
    )
    if model.narrower:
        whole, left = (widths_of(one.skeleton.config) for one in (model, model.narrower))
        console.print(
            f"structures: {left.groups} of {whole.groups} key/value groups and {left.neurons} of {whole.neurons}"
            f" neurons stay in a layer, {model.narrower.parameters:,} parameters",
            highlight=False,
            soft_wrap=True,
        )
    elif model.fewer:
        before, after = (max(shape.experts for shape in one.shapes) for one in (model, model.fewer))
        console.print(
            f"experts: {after} of {before} stay in a layer, {model.fewer.parameters:,} parameters",
            highlight=False,
            soft_wrap=True,
        )
    elif line := left_dense(model.skeleton.family.kinds):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{recipe.nodes} x {recipe.gpus} {row.name} of {gigabytes(row.bytes)}; a node has"
        f" {gigabytes(row.host * recipe.gpus)} of memory, network {gigabytes(row.network)}/s, storage"
        f" {gigabytes(row.storage)}/s (rates as expected, not measured)",
        highlight=False,
        soft_wrap=True,
    )
    aimed = recipe.targets == "auto" and recipe.towards_stream and not model.fewer
    if recipe.quality != "fast" or aimed:
        fields = recipe.chosen | recipe.decided
        console.print(
            f"quality {recipe.quality}: {', '.join(f'{name} {value}' for name, value in fields.items())}",
            highlight=False,
            soft_wrap=True,
        )
    for plan in result.plans:
        console.print()
        _show_plan(plan, console, unit)
        if result.simulated:
            _show_simulation(plan, console)
    asked = recipe.propagation in ("parallel", "both") and not model.fewer
    if asked and not any(plan.propagation == "parallel" for plan in result.plans):
        console.print()
        console.print(f"parallel: {second_shard(recipe, model)}", highlight=False, soft_wrap=True)


def _show_plan(plan: Planned, console: Console, unit: str) -> None:
    one, setup = plan.candidate, plan.candidate.setup
    longest = max(len(shard) for shard in setup.layout.shards)
    name = "experts" if one.task.model.fewer else plan.propagation
    console.print(
        f"{name}: {'fits' if plan.fits else 'does not fit'}; up to {longest} layers a shard",
        style="bold",
        highlight=False,
        soft_wrap=True,
    )
    options = " ".join(f"--{name} {value}" for name, value in plan.options.items())
    console.print(options, highlight=False, soft_wrap=True)
    if setup.trains_on_host:
        console.print("moments of the training are on the host between steps", highlight=False)
    if plan.missing:
        console.print(f"missing: {plan.missing}", highlight=False, soft_wrap=True)
        console.print(f"what helps: {'; or '.join(plan.helps)}", highlight=False, soft_wrap=True)
    if plan.unused:
        console.print(plan.unused, highlight=False, soft_wrap=True)
    console.print(f"GB of a {unit} at its peak:", highlight=False)
    console.print(_memory_table(plan))
    if setup.gpu:
        console.print(f"room on a GPU {gigabytes(one.device_room)}", highlight=False)
    console.print(
        f"memory of the fullest node {gigabytes(one.node)} of {gigabytes(one.node_room)}",
        highlight=False,
    )
    moved = plan.traffic
    console.print(
        f"between workers {gigabytes(moved.between_workers)}, of it between nodes {gigabytes(moved.between_nodes)};"
        f" read {gigabytes(moved.read)}, written {gigabytes(moved.written)}",
        highlight=False,
        soft_wrap=True,
    )
    if plan.writing and plan.writing.fits:
        console.print(_line_of_writing(plan.writing), highlight=False, soft_wrap=True)
    phases = ", ".join(f"{name} {duration(value)}" for name, value in vars(one.seconds).items() if value)
    console.print(f"expected: {duration(one.seconds.total)} ({phases})", highlight=False, soft_wrap=True)


def _line_of_writing(writing: Writing) -> str:
    shards, replicas = len(writing.layout.shards), writing.layout.replicas
    layers = "layers in memory" if writing.room.resident else "every token takes a reading of all layers"
    if writing.smaller:
        layers += f" (with --self-batch {writing.smaller} they stay in memory)"
    return (
        f"writes calibration text first: {writing.sequences} sequences in batches of {writing.batch} on {shards} x"
        f" {replicas} (shards x replicas), {layers}; of a worker {gigabytes(writing.held)} of weights,"
        f" {gigabytes(writing.room.batch_bytes)} of keys, values and states for each batch under way; expected:"
        f" {duration(writing.seconds)}"
    )


def _memory_table(plan: Planned) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # narrow columns, to fit 80 characters
    table.add_column("phase")
    table.add_column("step")
    names = ("weights", "activations", "statistics", "workspace")
    for name in (*names, "all", "host"):
        table.add_column(name, justify="right")
    for phase, moment in plan.candidate.peaks.items():
        counts = [getattr(moment.device, name) for name in names]
        host = f"{moment.host.peak / 1e9:.1f}" if plan.candidate.setup.gpu else "-"
        peak = f"{moment.device.peak / 1e9:.1f}"
        table.add_row(phase, moment.step, *(f"{count / 1e9:.1f}" for count in counts), peak, host)
    return table


def _show_simulation(plan: Planned, console: Console) -> None:
    group = plan.group
    parts = ", ".join(f"{name} {duration(value)}" for name, value in group.phases.items())
    idle = idle_share(group)
    console.print(
        f"simulated: {duration(group.seconds)} ({parts}); workers idle {idle:.0%}", highlight=False, soft_wrap=True
    )
    for line in _lines(plan):
        console.print(line, highlight=False, markup=False, no_wrap=True, crop=False, overflow="ignore")
    console.print(LEGEND, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("simulated with")
    for name in ("shards", "replicas", "time", "idle"):
        table.add_column(name, justify="right")
    for row in plan.growth:
        table.add_row(row.changed, str(row.shards), str(row.replicas), duration(row.seconds), f"{row.idle:.0%}")
    if plan.growth:
        console.print(table)


def _lines(plan: Planned) -> Iterator[str]:
    lines = timeline(plan.group)
    width = max(len(label) for label, _, _ in lines)
    for label, chart, idle in lines:
        yield f"{label:>{width}} |{chart}| {idle:4.0%} idle"
