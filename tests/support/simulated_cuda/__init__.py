"""A simulated GPU for machines without one: tensors say that they are on cuda:0, and their values lie on the CPU.

    with simulated_cuda() as gpu:
        prune(Recipe(..., device="cuda"))
    gpu.counts.total()   # operations launched, host synchronisations, bytes over PCIe

Every operation on such a tensor goes through one function: a mixture of devices raises an error as on CUDA, an
operation counts as one launch (a GPU takes several kernels for some), and whatever makes the host wait for the device
counts as a synchronisation, by the line of shardprune that caused it. Memory is counted as well, without the
temporaries inside an operation, and more than there is raises `torch.OutOfMemoryError`.

Streams, events, pinned memory and copies that do not block have stand-ins: all is done in the order of the program, so
that a missing wait between streams shows no wrong value here. Triton's kernels are not launched, whatever the build of
torch. Autograd does not run.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

from tests.support.environment import same_environment
from tests.support.simulated_cuda.counts import Counts, Total
from tests.support.simulated_cuda.driver import driver
from tests.support.simulated_cuda.guard import COMPILER, load_guard
from tests.support.simulated_cuda.tensors import GPU, SimulatedGpu, SimulatedTensor, on_simulated_gpu, to_cpu

__all__ = ["Counts", "SimulatedGpu", "SimulatedTensor", "Total", "needs_simulated_cuda", "simulated_cuda", "to_cpu"]

H100_BYTES = 80 * 10**9

needs_simulated_cuda = pytest.mark.skipif(
    COMPILER is None or torch.cuda.is_available(), reason="no C++ compiler, or a real GPU"
)


@contextmanager
def simulated_cuda(memory: int = H100_BYTES) -> Iterator[SimulatedGpu]:
    """Give this process a simulated GPU with so many bytes of memory, and nothing counted yet."""
    assert not torch.cuda.is_available(), "there is a real GPU"
    load_guard()
    gc.collect()  # tensors of an earlier one
    GPU.reset(memory)
    run = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with on_simulated_gpu():
            run(thread)

    with ExitStack() as stack:
        stack.enter_context(same_environment())  # a worker sets its allocator
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_there))
        stack.enter_context(driver(GPU))
        # A CUDA build of torch would launch Triton's kernels; tests/solvers/test_column_kernel.py interprets those.
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_built", return_value=False))
        stack.enter_context(on_simulated_gpu())
        yield GPU
