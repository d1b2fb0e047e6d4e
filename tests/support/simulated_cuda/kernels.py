"""Triton's kernels on the simulated GPU: each launch counts, and Triton's interpreter carries it out on the values."""

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from tests.support.simulated_cuda.tensors import SimulatedGpu, SimulatedTensor, to_cpu


@contextmanager
def interpreted_kernels(gpu: SimulatedGpu) -> Iterator[None]:
    """Interpret kernels that are launched on tensors of the device, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launched(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = [value for value in (*args, *kwargs.values()) if hasattr(value, "data_ptr")]
        assert all(isinstance(value, SimulatedTensor) for value in given), f"{name}: a pointer to the host's memory"
        gpu.counts.launch(name)
        gpu.counts.work(sum(value.nbytes for value in given))
        return tuple(map(to_cpu, args)), {key: to_cpu(value) for key, value in kwargs.items()}

    interpret = InterpretedFunction.run

    def run_interpreted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        args, kwargs = launched(kernel.__name__, args, kwargs)
        return interpret(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def run_compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        args, kwargs = launched(kernel.fn.__name__, args, kwargs)
        with _interpreted_calls(kernel.fn):
            return interpret(InterpretedFunction(kernel.fn), *args, grid=grid, warmup=warmup, **kwargs)

    with (
        mock.patch.object(InterpretedFunction, "run", run_interpreted),
        mock.patch.object(JITFunction, "run", run_compiled),
    ):
        yield


@contextmanager
def _interpreted_calls(function: Any) -> Iterator[None]:
    """Make interpreted functions of those that a kernel calls."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    known = function.__globals__
    called = {name: value for name, value in known.items() if isinstance(value, JITFunction)}
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.dict(known, {name: InterpretedFunction(value.fn) for name, value in called.items()})
        )
        yield
