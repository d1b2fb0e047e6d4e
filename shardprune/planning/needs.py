"""What the workers of a run cannot do without, for the check that they make when they start."""

from dataclasses import replace

from shardprune.cluster.layout import Layout
from shardprune.planning.memory import Moment, Setup, WorkerMemory
from shardprune.planning.workload import Model, Task, task_of
from shardprune.recipes.identity import AnyRecipe
from shardprune.recipes.prune import PruneRecipe
from shardprune.shard.spec import Need
from shardprune.storage.quantities import gigabytes


def needs(recipe: AnyRecipe, model: Model, layout: Layout, itemsize: int, windows: int) -> list[Need | None]:
    """Of every shard, what one of its workers takes on its device at its peak, at the least.

    Waves count where they must be on the device; a run whose memory is not modelled (structures that go, a sparse
    model that is adopted) needs nothing.

    Args:
        itemsize: bytes of a number that is computed with.
        windows: of the longest text that perplexity is measured on.
    """
    if not isinstance(recipe, PruneRecipe):
        return [None] * len(layout.shards)
    task = replace(task_of(recipe, model, itemsize), windows=windows)
    gpu = recipe.device == "cuda"
    setup = Setup(layout, recipe.weights == "streamed", recipe.activations != "device", gpu)
    return [_need(task, setup, shard) for shard in range(len(layout.shards))]


def _need(task: Task, setup: Setup, shard: int) -> Need:
    worst = _worst(task, setup, shard)
    taken = worst.device.peak
    others = {
        "weights streamed": _worst(task, replace(setup, streamed=True), shard).device.peak,
        "method wanda without measure_error": _worst(
            replace(task, solver="wanda", kind="squares", errors=False), setup, shard
        ).device.peak,
        "wave 1": _worst(replace(task, wave=1), setup, shard).device.peak,
        "half the samples": _worst(replace(task, samples=max(1, task.samples // 2)), setup, shard).device.peak,
    }
    least = min(others, key=lambda label: others[label])
    helps = f"{least} takes {gigabytes(others[least])}" if others[least] < taken else "more shards take less"
    return Need(taken, f"{worst.phase}, {worst.step}", f"{helps}; `shardprune plan` finds a layout that fits")


def _worst(task: Task, setup: Setup, shard: int) -> Moment:
    return max(WorkerMemory(task, setup, shard).moments(), key=lambda moment: moment.device.peak)
