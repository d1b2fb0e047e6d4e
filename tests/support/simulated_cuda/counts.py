"""What a program asked of a simulated GPU, by the line of shardprune that asked for it."""

import sys
import threading
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

import shardprune

PACKAGE = str(Path(shardprune.__file__).parent)


NARROW = 128  # terms of a product's sums up to which its memory takes the time, not its arithmetic


@dataclass(frozen=True)
class Total:
    """Launches, synchronisations of the host with the device, and bytes copied to the device and to the host, of which
    `pageable` were copied from or to memory of the host that is not pinned."""

    launches: int
    syncs: int
    to_device: int
    to_host: int
    pageable: int


class Counts:
    """Counts by line, `FILE:LINE` within the package.

    Attributes:
        operations: launches by the operation.
        arithmetic: operations of products by the precision of their factors, such as `bfloat16` or `tf32`; those with
            short sums, such as `tf32 narrow`, apart.
        traffic: bytes of the device's memory that products of such a precision read and write, and all other
            operations (`other`).
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.to_device: Counter[str] = Counter()
        self.to_host: Counter[str] = Counter()
        self.pageable: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.arithmetic: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self._lock = threading.Lock()

    def clear(self) -> None:
        for counter in vars(self).values():
            if isinstance(counter, Counter):
                counter.clear()

    def launch(self, operation: str) -> None:
        line = calling_line()
        with self._lock:
            self.launches[line] += 1
            self.operations[operation] += 1

    def sync(self) -> None:
        line = calling_line()
        with self._lock:
            self.syncs[line] += 1

    def copy(self, size: int, to_device: bool, pinned: bool = False) -> None:
        """Count a copy of `size` bytes."""
        line = calling_line()
        with self._lock:
            (self.to_device if to_device else self.to_host)[line] += size
            self.pageable[line] += 0 if pinned else size

    def work(self, traffic: int, precision: str = "other", arithmetic: int = 0) -> None:
        """Count what an operation costs the device."""
        with self._lock:
            self.traffic[precision] += traffic
            if arithmetic:
                self.arithmetic[precision] += arithmetic

    def total(self) -> Total:
        """Return the sums over all lines."""
        return Total(**{field.name: getattr(self, field.name).total() for field in fields(Total)})


def calling_line() -> str:
    """Return the innermost line of shardprune that is being carried out."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE):
            return f"{name.removeprefix(PACKAGE).lstrip('/')}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
