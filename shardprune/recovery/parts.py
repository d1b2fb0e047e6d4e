"""The seconds of a training step by part."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PartClock:
    """The clock of one step's parts. On a GPU it is the device's, which works behind the host; elsewhere the host's.

    Parts: `data` is waiting for rows, `teacher` its predictions, `forward`, `backward` with the gradients' way to the
    other processes, and `step`, the optimizer's.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as this part."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part; on a GPU call it when the host has waited for the device."""
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in self._spans:
            sums[name] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        return {name: round(value, 6) for name, value in sums.items()}

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
