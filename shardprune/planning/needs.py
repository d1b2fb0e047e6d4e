"""What the workers of a run cannot do without, for the check that they make when they start."""

from dataclasses import replace

from shardprune.planning.memory import of_shard
from shardprune.planning.moments import Moment, Setup
from shardprune.planning.narrowing import narrowing_task
from shardprune.planning.workload import Task
from shardprune.shard.spec import Need
from shardprune.solvers.methods import METHODS
from shardprune.storage.quantities import gigabytes


def needs(task: Task, setup: Setup) -> list[Need]:
    """Return what a worker of each shard takes on its device at its peak, at the least."""
    return [_need(task, setup, shard) for shard in range(len(setup.layout.shards))]


def _need(task: Task, setup: Setup, shard: int) -> Need:
    worst = _worst(task, setup, shard)
    taken = worst.device.peak
    others = {"weights streamed": _worst(task, replace(setup, streamed=True), shard).device.peak}
    if task.scoring and task.model.narrower:
        activity = replace(task.scoring, score="amp", correction=False)
        sums = narrowing_task(replace(task, errors=False), activity)
        others["score amp without correction and measure_error"] = _worst(sums, setup, shard).device.peak
    else:
        squares = replace(task, effort=METHODS["wanda"].effort, kind="squares", errors=False)
        others["method wanda without measure_error"] = _worst(squares, setup, shard).device.peak
    others |= {
        "wave 1": _worst(replace(task, wave=1), setup, shard).device.peak,
        "half the samples": _worst(replace(task, samples=max(1, task.samples // 2)), setup, shard).device.peak,
    }
    if task.kind == "gram" and task.model.shape.experts:
        chunks = 4 * setup.chunks
        others[f"expert_chunks {chunks}"] = _worst(task, replace(setup, chunks=chunks), shard).device.peak
    if task.improving.stream_targets:
        others["targets own"] = _worst(
            replace(task, improving=replace(task.improving, stream_targets=False)), setup, shard
        ).device.peak
    if task.improving.reconstruction:
        without = replace(task, improving=replace(task.improving, reconstruction=0))
        others["no reconstruct"] = _worst(without, setup, shard).device.peak
    if task.curves:
        others["allocation uniform"] = _worst(replace(task, curves=False), setup, shard).device.peak
    least = min(others, key=lambda label: others[label])
    helps = f"{least} takes {gigabytes(others[least])}" if others[least] < taken else "more shards take less"
    return Need(taken, f"{worst.phase}, {worst.step}", f"{helps}; `shardprune plan` finds a layout that fits")


def _worst(task: Task, setup: Setup, shard: int) -> Moment:
    moments = (moment for worker in of_shard(task, setup, shard) for moment in worker.moments())
    return max(moments, key=lambda moment: moment.device.peak)
