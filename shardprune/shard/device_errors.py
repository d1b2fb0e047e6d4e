"""Errors of a GPU: memory that is too small ends a run, and a dead context loses the worker."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from shardprune.errors import OutOfMemory, WorkerLost, first_line

CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, where memory is not PyTorch's: a context, a library's handle
HELP = "--weights streamed, --activations host, a smaller --wave and more --shards take less"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device had too little memory, for a tensor or for what CUDA and its libraries need."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY
    return isinstance(error, RuntimeError) and "STATUS_ALLOC_FAILED" in str(error)  # cuBLAS, cuSOLVER


def context_is_dead(error: BaseException) -> bool:
    """Return whether an error has left this process without a GPU: an illegal access, an uncorrectable memory error, a
    GPU that has fallen off the bus. CUDA repeats it at every later call of the process."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


@contextmanager
def device_errors(work: Callable[[], str]) -> Iterator[None]:
    """Say which worker had an error of its device, and in which `work`.

    Raises:
        OutOfMemory: the device has too little memory.
        WorkerLost: the process can no longer use its device.
    """
    try:
        yield
    except (OutOfMemory, WorkerLost):
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            reason = first_line(error).partition(" Including ")[0].rstrip(".")  # the rest is the allocator's statistics
            raise OutOfMemory(f"{work()}: its device is too small ({reason}); {HELP}") from error
        if context_is_dead(error):
            raise WorkerLost(f"{work()}: {first_line(error)}") from error
        raise
