"""Restarts: attempts at a run, each on the workers that are left after some were lost."""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from shardprune.cluster.group import Backend
from shardprune.errors import WorkerLost, first_line
from shardprune.report.progress import Reporter

L = TypeVar("L", bound="Shrinkable")


class Shrinkable(Protocol):
    """A distribution of work over workers."""

    def shrunk_to(self: L, slots: int) -> L:
        """Return the distribution for at most `slots` workers."""


class Attempts(Generic[L]):
    """Attempts at a piece of work, until one ends without losing workers:

        for attempt in Attempts(planned, "cuda", 3, backend, reporter, state.lost):
            with attempt as layout:
                ...

    An attempt that loses workers is followed by another one, on a layout for those that are left.

    Args:
        planned: the layout of the first attempt.
        device: of the workers.
        max_restarts: how often lost workers are replaced.
        on_loss: called whenever workers were lost.

    Raises:
        WorkerLost: that happened more than `max_restarts` times, no worker is left, or the backend replaces none.
    """

    def __init__(
        self,
        planned: L,
        device: str,
        max_restarts: int,
        backend: Backend,
        reporter: Reporter,
        on_loss: Callable[[], None],
    ) -> None:
        self._planned, self._layout = planned, planned
        self._device, self._max_restarts = device, max_restarts
        self._backend, self._reporter, self._on_loss = backend, reporter, on_loss
        self._losses = 0
        self._over = False

    def __iter__(self) -> Iterator["Attempts[L]"]:
        while not self._over:
            yield self

    def __enter__(self) -> L:
        return self._layout

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if not isinstance(error, WorkerLost):
            self._over = True
            return False
        self._losses += 1
        self._reporter.events.emit("lost", reason=first_line(error))
        self._on_loss()
        if self._losses > self._max_restarts:
            return False
        if not self._backend.replaces:
            return False
        self._reporter.say(f"a worker was lost ({error}); going on with what is left")
        left = self._backend.settle().workers(self._device)
        if not left:
            return False
        self._layout = self._planned.shrunk_to(left)
        return True
