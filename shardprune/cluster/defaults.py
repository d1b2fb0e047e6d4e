"""Defaults that depend on the machine or the checkpoint: device, dtype and threads."""

from typing import Literal

from shardprune.cluster.group import Slots
from shardprune.errors import InputError
from shardprune.shard.cuda import check_tf32


def device_of(asked: Literal["auto", "cpu", "cuda"], slots: Slots) -> Literal["cpu", "cuda"]:
    """Return the device of the computation.

    Raises:
        InputError: a GPU is asked for, and there is none, or the environment spoils what it computes.
    """
    if asked == "cuda" and not slots.gpus:
        raise InputError("device", "'cuda' needs a GPU, and there is none; use cpu")
    device = asked if asked != "auto" else ("cuda" if slots.gpus else "cpu")
    if device == "cuda":
        check_tf32()
    return device


def exchange_of(
    asked: Literal["auto", "group", "store"], backend: str, device: str
) -> Literal["auto", "group", "store"]:
    """Return the way of tensors between workers; `auto` where there is one process, and so no way.

    On GPUs NCCL copies from memory to memory, and the object store over the host three times. On CPUs gloo copies
    through sockets, which is no faster than shared memory.
    """
    if backend == "local" or asked != "auto":
        return asked
    return "group" if device == "cuda" else "store"


def threads_of(slots: Slots, workers: int) -> int:
    """Return the CPU threads of each of `workers` workers."""
    return max(1, min(slots.cpus // workers, slots.cpus_of_a_node))
