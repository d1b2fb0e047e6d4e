"""Wall-clock time of a run's phases."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from shardprune.report.events import Events


class Clock:
    """Wall-clock seconds by phase; the beginning and end of each are emitted to `events`."""

    def __init__(self, events: Events) -> None:
        self.seconds: dict[str, float] = {}
        self._events = events
        self._started = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self._events.emit("begin", phase=name)
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            self._events.emit("end", phase=name, seconds=round(seconds, 3))

    def total(self) -> dict[str, float]:
        """Return the seconds of all phases and their total so far, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in self.seconds.items()} | {
            "total": round(time.monotonic() - self._started, 3)
        }
