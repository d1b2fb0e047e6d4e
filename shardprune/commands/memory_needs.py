"""What the workers of a prepared run cannot do without, by the formulae of `shardprune plan`."""

from dataclasses import replace
from typing import TYPE_CHECKING

from shardprune.cluster.layout import Layout
from shardprune.model.opening import stored_dtype
from shardprune.model.pruning_job import Zeroing
from shardprune.planning.moments import Setup
from shardprune.planning.narrowing import narrowing_task
from shardprune.planning.needs import needs
from shardprune.planning.workload import Task, model_of, task_of
from shardprune.shard.narrowed_layers import skeleton_of_widths
from shardprune.shard.spec import Need
from shardprune.solvers.pattern import Unstructured

if TYPE_CHECKING:
    from shardprune.commands.prepared import Prepared

# A job with the largest statistics and workspace.
STAND_IN = Zeroing("sparsegpt", Unstructured(), 0.5, "uniform", outlier_m=5.0, spread=0.08)


def least_needs(prepared: "Prepared", layout: Layout) -> list[Need] | None:
    """Return what a worker of each shard cannot do without at the least: kept waves are not counted where they may be
    on the host, nor what a training needs between its steps. None for jobs of which no formula says it."""
    task, setup = _task(prepared), _setup(prepared, layout, True)
    if isinstance(prepared.job.zeroing, Zeroing):
        return needs(task, setup)
    if prepared.widths is None:
        return None
    assert prepared.job.scoring is not None
    left = model_of(skeleton_of_widths(prepared.skeleton, prepared.widths), task.model.name, task.model.stored)
    narrowing = narrowing_task(task, prepared.job.scoring)
    return needs(replace(narrowing, model=replace(task.model, narrower=left)), setup)


def usual_needs(prepared: "Prepared", layout: Layout) -> list[Need]:
    """Return what a worker of each shard takes, kept waves not counted where they may be on the host. Jobs that zero no
    weights are taken for SparseGPT, whose statistics and factors they have."""
    return needs(_task(prepared), _setup(prepared, layout, False))


def _task(prepared: "Prepared") -> Task:
    placement, job, checkpoint = prepared.placement, prepared.job, prepared.checkpoint
    return task_of(
        model_of(prepared.skeleton, placement.workers.model, stored_dtype(checkpoint), checkpoint.bytes_of_fp8()),
        job.zeroing if isinstance(job.zeroing, Zeroing) else STAND_IN,
        errors=job.measure_error,
        samples=prepared.recipe.samples,
        seqlen=prepared.recipe.seqlen,
        wave=prepared.wave,
        sources=len(prepared.evaluations),
        windows=max(map(len, prepared.evaluations.values()), default=0),
        itemsize=placement.dtype.itemsize,
        improving=job.improving,
    )


def _setup(prepared: "Prepared", layout: Layout, trains_on_host: bool) -> Setup:
    workers = prepared.placement.workers
    gpu, may_leave = workers.device == "cuda", workers.activations != "device"
    joined = workers.exchange == "group" and layout.workers > 1
    return Setup(layout, prepared.streamed, may_leave, gpu, joined, prepared.recipe.asked.chunks, trains_on_host)
