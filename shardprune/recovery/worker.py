"""The whole life of one training process, under Ray or alone."""

import gc
import importlib
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

from shardprune.errors import TrainingError, first_line
from shardprune.model.checkpoint import reopened
from shardprune.model.skeleton import Skeleton
from shardprune.recovery.spec import TrainingSpec
from shardprune.shard.cuda import keep_float32, set_allocator
from shardprune.shard.device_errors import is_out_of_memory
from shardprune.shard.memory import check_memory, peak_bytes
from shardprune.storage.journal import Journal


def train_worker(spec: TrainingSpec, device: torch.device) -> dict[str, Any]:
    """Train and write the result as one process of torch's default group; return its measurements.

    A failure here happens in all processes, or ends the others' collectives.

    Args:
        device: the process's own; a GPU has an index among those that the process sees.

    Raises:
        InputError: its memory is too small, an input that the driver has checked is gone, DeepSpeed rejects the user's
            settings, or the environment makes float32 products less exact.
        TrainingError: the loss diverges, a trained tensor overflows the dtype in which it is stored, or a GPU is too
            small.
    """
    recipe, started = spec.recipe, time.monotonic()
    with _small_gpus_named():
        _prepare(spec, device)
        if spec.need is not None:
            check_memory(spec.need, device)
        from shardprune.recovery.training import Training
        from shardprune.recovery.writing import write_layers, write_trained_frame

        training = Training(spec, device)
        loaded = time.monotonic()
        model = training.run()
        trained = time.monotonic()
        checkpoint = reopened(recipe.model, spec.inputs["model"])
        skeleton = Skeleton(checkpoint.config, "cpu")
        journal = Journal(recipe.out, spec.fingerprint, skeleton.layers, checkpoint.place)
        write_layers(model, skeleton.family, checkpoint, journal, recipe.zero)
        if recipe.full:
            write_trained_frame(model, skeleton, checkpoint, journal, recipe.zero)
        stored = training.teacher_seconds if recipe.teacher_top else None
        del model
        training.leave()
    ended = time.monotonic()
    return {
        "shard": 0,
        "replica": dist.get_rank(),
        "node": socket.gethostname(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "peak_bytes": peak_bytes(device),
        "busy_seconds": round(ended - started, 3),
        "seconds": {
            "load": round(loaded - started - (stored or 0.0), 3),
            **({} if stored is None else {"teacher": round(stored, 3)}),
            "train": round(trained - loaded, 3),
            "write": round(ended - trained, 3),
        },
    }


@contextmanager
def _small_gpus_named() -> Iterator[None]:
    """Raise a TrainingError that says what helps where a device has no memory left."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"a GPU is too small ({first_line(error)}); --zero 3, --offload, --recompute and --micro-batch 1 help"
        ) from error


@contextmanager
def alone(device: str) -> Iterator[None]:
    """Provide a process group of this process alone."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in variables}
    linear = torch.nn.functional.linear  # ZeRO-3 replaces it globally
    threads = torch.get_num_threads()
    os.environ |= variables
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        _end_group()
        gc.collect()  # the engine is a reference cycle, and the next run may need its memory
        if device == "cuda":
            torch.cuda.empty_cache()
        torch.nn.functional.linear = linear
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _prepare(spec: TrainingSpec, device: torch.device) -> None:
    """Set the environment and devices that DeepSpeed needs before it is imported."""
    torch.set_num_threads(spec.recipe.threads)
    if device.type == "cuda":
        set_allocator()
        keep_float32()
        torch.cuda.set_device(device)
        # DeepSpeed takes the GPU of this index; a rank on the node is another number where a process sees one GPU.
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("DS_ACCELERATOR", spec.recipe.device)
    # DeepSpeed imports distutils to look for libraries, and setuptools cannot be imported behind that.
    with suppress(ImportError):
        importlib.import_module("setuptools")


def _end_group() -> None:
    """Destroy DeepSpeed's group and torch's."""
    import deepspeed.comm

    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:  # an error came before DeepSpeed took torch's group
        dist.destroy_process_group()
