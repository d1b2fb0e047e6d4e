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


def threads_of(slots: Slots, workers: int) -> int:
    """Return the CPU threads of each of `workers` workers."""
    return max(1, min(slots.cpus // workers, slots.cpus_of_a_node))
