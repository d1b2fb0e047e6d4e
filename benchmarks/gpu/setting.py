"""Device and sizes that all steps share, and how seconds are taken on either device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The device of a run; `small` sizes say nothing and only show that a step works."""

    device: str
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def size(self, large: int, small: int) -> int:
        return small if self.small else large

    def sizes(self, large: tuple[T, ...], small: tuple[T, ...]) -> tuple[T, ...]:
        return small if self.small else large

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the median seconds of some work, which has run once before: on a GPU from one event to another."""
        work()
        self.synchronize()
        taken = []
        for _ in range(1 if self.small else repeats):
            if self.cuda:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                work()
                last.record()
                last.synchronize()
                taken.append(first.elapsed_time(last) / 1e3)
            else:
                started = time.perf_counter()
                work()
                taken.append(time.perf_counter() - started)
        return statistics.median(taken)
