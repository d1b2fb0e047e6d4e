"""What a recipe leaves open, and the machine or the checkpoint decides."""

import torch

from shardprune.cluster.group import Slots
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.recipes.groups import BackendFields, WorkerFields


def device_of(workers: BackendFields, slots: Slots) -> str:
    """The device of the computation.

    Raises:
        InputError: a GPU is asked for, and there is none.
    """
    if workers.device == "cuda" and not slots.gpus:
        raise InputError("device", "'cuda' needs a GPU, and there is none; use cpu")
    return workers.device if workers.device != "auto" else ("cuda" if slots.gpus else "cpu")


def dtype_of(workers: WorkerFields, checkpoint: Checkpoint, whole: bool = False) -> torch.dtype:
    """The dtype of the computation: float32 on a CPU, which is slow at anything narrower, and where asked
    for; else the dtype in which the model's weights are stored, if it is one.

    Args:
        whole: look at biases and norms, too.
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
    """CPU threads of each of so many workers."""
    return max(1, min(slots.cpus // workers, slots.cpus_of_a_node))
