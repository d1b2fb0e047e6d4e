"""Stand-ins for what torch.cuda has beside tensors: the device's properties, its memory, streams and events."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.support.simulated_cuda.tensors import DEVICE, SimulatedGpu

_current = threading.local()


class Event:
    """A moment of a stream; all that was asked before it is done when it is recorded."""

    gpu: SimulatedGpu

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timing, self._at = enable_timing, None

    def record(self, stream: "Stream | None" = None) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: "Stream | None" = None) -> None:
        """The stream waits, the host does not."""

    def synchronize(self) -> None:
        self.gpu.counts.sync()

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds."""
        assert all(event._timing for event in (self, end)), "both events must be created with enable_timing=True"
        assert None not in (self._at, end._at), "both events must be recorded"
        return (end._at - self._at) * 1000  # type: ignore[operator]


class Stream:
    """A queue of the device; the program's order is kept."""

    gpu: SimulatedGpu
    device = DEVICE

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.priority = priority

    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.gpu.counts.sync()


DEFAULT = Stream()


@contextmanager
def _in_stream(stream: Stream | None) -> Iterator[None]:
    before = _stream()
    _current.stream = stream or before
    try:
        yield
    finally:
        _current.stream = before


def _stream(device: Any = None) -> Stream:
    return getattr(_current, "stream", DEFAULT)


@contextmanager
def driver(gpu: SimulatedGpu) -> Iterator[None]:
    """Put the stand-ins into torch.cuda."""
    Event.gpu = Stream.gpu = gpu
    properties = SimpleNamespace(
        total_memory=gpu.memory, name="simulated", major=9, minor=0, multi_processor_count=132, warp_size=32
    )
    functions = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "simulated",
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: gpu.counts.sync(),
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: gpu.allocated,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "memory_reserved": lambda device=None: gpu.allocated,
        "max_memory_reserved": lambda device=None: gpu.peak,
        "mem_get_info": lambda device=None: (gpu.memory - gpu.allocated, gpu.memory),
        "reset_peak_memory_stats": lambda device=None: setattr(gpu, "peak", gpu.allocated),
        "Event": Event,
        "Stream": Stream,
        "stream": _in_stream,
        "set_stream": lambda stream: setattr(_current, "stream", stream),
        "current_stream": _stream,
        "default_stream": lambda device=None: DEFAULT,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **functions))
        # Otherwise `torch.tensor(..., device="cuda")` would copy to a device that torch does not have.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        yield
