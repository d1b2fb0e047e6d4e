"""The peak memory of one layer of Llama-70B shape against what the planner says."""

import tempfile

import torch

from benchmarks import layer_70b
from benchmarks.gpu import layer
from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune.cluster.layout import plan_layout
from shardprune.planning.memory import WorkerMemory
from shardprune.planning.moments import Moment, Setup
from shardprune.planning.workload import model_of, task_of
from shardprune.shard.memory import ESTIMATE_ERROR, peak_bytes


def run(setting: Setting, rows: Rows) -> None:
    args = layer.options(setting)
    with tempfile.TemporaryDirectory() as folder:
        layer_70b.make_checkpoint(folder, layer_70b.llama(args), args.device)
        if setting.cuda:  # the drawing of the weights is no part of it
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        layer_70b.prune_layer(folder, f"{folder}/out", args)
        peak = peak_bytes(torch.device(args.device))
        worker = layer_70b.worker_of(folder, f"{folder}/other", args)
        task = task_of(
            model_of(worker.skeleton, folder, torch.bfloat16),
            worker.spec.job.zeroing,
            errors=True,
            samples=args.samples,
            seqlen=args.seqlen,
            wave=args.wave,
            sources=0,
            windows=0,
            itemsize=worker.skeleton.dtype.itemsize,
        )
    layout = plan_layout(1, args.samples, "exact", 1, 1, None)
    setup = Setup(layout, streamed=False, waves_on_host=False, gpu=setting.cuda)
    moments = [moment for moment in WorkerMemory(task, setup, 0).moments() if "embed" not in moment.step]

    def taken(moment: Moment) -> int:
        return moment.device.peak

    worst = max(moments, key=taken)
    rows.add("peak, planned", taken(worst) / 2**30, "GiB")
    rows.add("step of the planned peak", worst.step)
    ratio = taken(worst) / peak
    # Small sizes are lost in what a process takes.
    near = 1 / ESTIMATE_ERROR < ratio < ESTIMATE_ERROR
    rows.add("peak, measured", peak / 2**30, "GiB")
    rows.add("planned / measured", ratio, ok=None if setting.small else near)
