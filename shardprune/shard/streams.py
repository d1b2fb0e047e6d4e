"""Copies beside the computation: side streams of a device, moments in them, and pinned host memory.

On a CPU there is one order of all work and one memory: moments have come when they are taken, side streams are the
program itself, and memory is ordinary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor


class Moment:
    """A moment in a device's work: all that was queued on a stream before it is done."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """Return the end of what this thread's current stream has queued so far."""
        return cls(torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None)

    def precedes_what_follows(self) -> None:
        """Let this thread's current stream wait, with all that is queued from now on. The host does not wait."""
        if self._event:
            torch.cuda.current_stream().wait_event(self._event)

    def wait(self) -> None:
        """Let the host wait."""
        if self._event:
            self._event.synchronize()


class SideStream:
    """A queue of a device beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, *moments: Moment) -> Iterator[None]:
        """Queue the work of a block here, after some moments of other streams; valid in any thread."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            for moment in moments:
                moment.precedes_what_follows()
            yield


def used_here(tensor: Tensor) -> None:
    """Keep the memory of a tensor that another stream has allocated until what is queued on the current one is done,
    even if the tensor is freed before that."""
    if tensor.device.type == "cuda":
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def host_memory(like: Tensor, device: torch.device) -> Tensor:
    """Return uninitialised host memory for a copy of a tensor, from and to which a device copies without the host's
    waiting.

    PyTorch keeps pinned memory that is freed for the next request of its size, once its copies are done: pinning takes
    half a second a gigabyte.
    """
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, contiguous, as soon as what the current stream has queued is done; a tensor that is
    there already, as it is."""
    if tensor.device.type == "cpu":
        return tensor.contiguous()
    there = host_memory(tensor, tensor.device)
    there.copy_(tensor, non_blocking=True)
    Moment.now(tensor.device).wait()
    return there


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A CPU's tensor goes through pinned memory, so that the host does not wait for what
    is queued before."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    staged = host_memory(tensor, device).copy_(tensor)
    return staged.to(device, non_blocking=True)
