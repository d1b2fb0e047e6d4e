"""Runs that say where they are while they are there, so that something can happen to them at that moment."""

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shardprune import Recipe, prune
from shardprune.report.events import Events
from shardprune.report.progress import Reporter, Step

Listener = Callable[[str, float], None]  # of the name of a phase that begins or of a step, and the step's share


class Heard(Reporter):
    """An output that tells a listener how far the run is, in the run's own thread: it goes on when that returns."""

    def __init__(self, listener: Listener) -> None:
        super().__init__(quiet=True)
        self.listener = listener
        self.events = _HeardEvents(listener)

    def show(self, step: Step) -> None:
        self.listener(step.label, step.done / step.total)


class _HeardEvents(Events):
    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def emit(self, event: str, **fields: Any) -> None:
        super().emit(event, **fields)
        if event == "begin":
            self._listener(f"begin {fields['phase']}", 0.0)


@dataclass
class Moment:
    """When something happens: once, when a run is at least so far in a step, or as a phase begins."""

    name: str
    share: float
    action: Callable[[], None]
    passed: bool = field(default=False, init=False)

    def __call__(self, name: str, share: float) -> None:
        if not self.passed and name == self.name and share >= self.share:
            self.passed = True
            self.action()


def main() -> None:
    """Prune as a recipe in JSON says; print the process's number, then every name and share, and go on when a line has
    come back."""
    print(os.getpid(), flush=True)
    turn = threading.Lock()

    def tell(name: str, share: float) -> None:
        with turn:
            print(json.dumps([name, share]), flush=True)
            sys.stdin.readline()

    prune(Recipe.checked(json.loads(sys.argv[1])), Heard(tell))


if __name__ == "__main__":
    main()
