"""Defaults that depend on the machine or the checkpoint: device, dtype and threads."""

import torch

from shardprune.cluster.group import Slots
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.recipes.groups import BackendFields, WorkerFields


def device_of(workers: BackendFields, slots: Slots) -> str:
    """Return the compute device, `cpu` or `cuda`.

    Raises:
        InputError: a GPU is asked for, and there is none.
    """
    if workers.device == "cuda" and not slots.gpus:
        raise InputError("device", "'cuda' needs a GPU, and there is none; use cpu")
    return workers.device if workers.device != "auto" else ("cuda" if slots.gpus else "cpu")


def dtype_of(workers: WorkerFields, checkpoint: Checkpoint, whole: bool = False) -> torch.dtype:
    """Return the compute dtype: float32 on CPUs, where narrower dtypes are slow, or if asked for; else the stored dtype
    of the weights, or float32 if they differ.

    Args:
        whole: include biases and norms.
    """
    stored = {
        entry.dtype
        for name, entry in checkpoint.entries.items()
        if len(entry.shape) == 2 or (whole and entry.dtype.is_floating_point and not name.endswith("inv_freq"))
    }
    if workers.dtype == "float32" or workers.device == "cpu" or len(stored) != 1:
        return torch.float32
    return stored.pop()


def threads_of(slots: Slots, workers: int) -> int:
    """Return the CPU threads of each of `workers` workers."""
    return max(1, min(slots.cpus // workers, slots.cpus_of_a_node))
