"""Printing of the plan of a fine-tuning as text."""

from rich.console import Console
from rich.table import Table

from shardprune.planning.training.plan import TrainingPlan, Way
from shardprune.storage.quantities import duration, gigabytes

PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "teacher", "buckets")


def show(plan: TrainingPlan, console: Console) -> None:
    """Print a plan."""
    recipe, row = plan.recipe, plan.recipe.row
    unit = "GPU" if row.gpu else "worker"
    share = plan.trained / plan.parameters
    precision = "bf16" if recipe.bf16 else "fp32"
    lines = [
        f"{recipe.model}: {plan.parameters:,} parameters, {plan.trained:,} trained ({share:.2%}) in {precision}",
        f"machines: {recipe.nodes} x {recipe.gpus} {row.name}, {gigabytes(row.bytes)} each",
        f"a step of {recipe.batch} rows of {recipe.length} tokens, {plan.micro_batch} at a time on each of "
        f"{recipe.processes} {unit}s",
    ]
    if plan.teacher_bytes is not None:
        lines.append(
            f"the teacher's {recipe.teacher_top} largest predictions are stored before, {plan.teacher_bytes:,} bytes a "
            "token, and it is not there while the student learns"
        )
    if plan.tower is not None and plan.image_size is not None:
        lines.append(
            f"images a row: {recipe.images_per_row}, each {plan.tower.tokens} of its tokens; what sees them has "
            f"{plan.tower.parameters:,} parameters, frozen and whole in every process; an image has "
            f"{' x '.join(map(str, plan.image_size))} pixels"
        )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    console.print(f"GB of a {unit} at its peak (host: of a node's memory):", highlight=False)
    console.print(_table(plan))
    ways = plan.ways
    console.print(
        f"room on a {unit} {gigabytes(ways[0].device_room)}, in a node's memory {gigabytes(ways[0].node_room)}"
    )
    chosen = plan.chosen
    if chosen is None:
        console.print(
            "nothing fits: more GPUs, a smaller --micro-batch or --length, or larger machines", soft_wrap=True
        )
        return
    work = chosen.work
    console.print(
        f"fastest that fits: {chosen.options}; expected {duration(work.seconds)} a step, "
        f"{work.tokens_per_second:,.0f} tokens/s",
        highlight=False,
        soft_wrap=True,
    )


def _table(plan: TrainingPlan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("options")
    for name in (*("weights", "grads", "optim", "acts", "work", "teacher", "buckets"), "all", "host", "s/step", "fits"):
        table.add_column(name, justify="right")
    for way in plan.ways:
        table.add_row(way.options.replace("--", ""), *_figures(way))
    return table


def _figures(way: Way) -> list[str]:
    device = way.memory.device
    counts = [*(getattr(device, name) for name in PARTS), device.peak, way.node]
    return [*(f"{count / 1e9:.1f}" for count in counts), f"{way.work.seconds:.2f}", "yes" if way.fits else "no"]
