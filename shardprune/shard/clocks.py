"""Clocks of a worker's calls: a call on a CPU is over when it returns, one on a GPU when the device has done it."""

import time
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """A source of marks, which tell times once they have come."""

    def mark(self) -> Any:
        """Return a mark of this moment in the order of the device's work."""

    def has_come(self, mark: Any) -> bool:
        """Return whether all work before a mark is done; does not wait."""

    def wait(self, mark: Any) -> None:
        """Wait until all work before a mark is done."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """Return the seconds between two marks that have come."""

    def time(self, mark: Any) -> float:
        """Return the seconds since the epoch of a mark that has come."""

    def give_back(self, *marks: Any) -> None:
        """Take back marks that are no longer needed."""


class HostClock:
    """The clock of work that is done when a call returns. Marks are seconds."""

    def mark(self) -> float:
        return time.monotonic()

    def has_come(self, mark: float) -> bool:
        return True

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier

    def time(self, mark: float) -> float:
        return time.time() - (time.monotonic() - mark)

    def give_back(self, *marks: float) -> None:
        pass


class DeviceClock:
    """The clock of a CUDA device. Marks are events of the current stream, which are used again.

    Between two marks lies the time that the device took for what was queued between them; where it had nothing to do,
    that is the host's time. Times of day are reckoned from an event at which host and device met.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[torch.cuda.Event] = []
        self._met = self.mark()
        self._met.synchronize()
        self._met_at = time.time()

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def has_come(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        return earlier.elapsed_time(later) / 1000

    def time(self, mark: torch.cuda.Event) -> float:
        return self._met_at + self.seconds(self._met, mark)

    def give_back(self, *marks: torch.cuda.Event) -> None:
        self._free += marks


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
