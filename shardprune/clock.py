"""What a run's phases take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def total(self) -> dict[str, float]:
        """All phases and their total so far, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in self.seconds.items()} | {
            "total": round(time.monotonic() - self._started, 3)
        }
