"""What a worker did: every call of a verb counts, for its result, the run's timeline and whoever watches."""

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

PAUSE_SECONDS = 1.0  # in a verb's calls, after which they are told apart


@dataclass
class Span:
    """The calls of one verb for one layer (None: for none in particular) between two accounts, with no pause between
    them that is longer than PAUSE_SECONDS.

    `start` and `end` are seconds since the epoch on the worker's clock, `busy` the seconds of the calls alone, `bytes`
    what tensors the calls brought to the worker.
    """

    verb: str
    layer: int | None
    start: float
    end: float
    busy: float = 0.0
    calls: int = 0
    bytes: int = 0

    def plain(self) -> list[Any]:
        """As a row of plain values, in the order of the fields."""
        times = (round(self.start, 3), round(self.end, 3), round(self.busy, 4))
        return [self.verb, self.layer, *times, self.calls, self.bytes]


class Watcher(Protocol):
    """Who is told of every call as it ends."""

    def __call__(self, verb: str, seconds: float, received: int) -> None: ...


class Ledger:
    """What a worker did since it started, by verb, and the spans since the last account."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.watcher: Watcher | None = None
        self._spans: dict[tuple[str, int | None], Span] = {}  # to which calls may be added
        self._closed: list[Span] = []

    def add(self, verb: str, layer: int | None, seconds: float, received: int) -> None:
        """A call has ended."""
        self.seconds[verb] = self.seconds.get(verb, 0.0) + seconds
        now = time.time()
        span = self._spans.get((verb, layer))
        if span is None or now - seconds - span.end > PAUSE_SECONDS:
            if span:
                self._closed.append(span)
            span = self._spans[verb, layer] = Span(verb, layer, now - seconds, now)
        span.end = now
        span.busy += seconds
        span.calls += 1
        span.bytes += received
        if self.watcher:
            self.watcher(verb, seconds, received)

    def hand_out(self) -> list[Span]:
        """The spans since the last time, in the order of their starts."""
        spans = sorted([*self._closed, *self._spans.values()], key=lambda span: span.start)
        self._spans, self._closed = {}, []
        return spans


class Accounting(Protocol):
    """Who has a ledger."""

    ledger: Ledger


def timed(verb: Callable) -> Callable:
    """Enter every call of a worker's verb into its ledger, with the layer that its argument `index` names."""
    names = list(inspect.signature(verb).parameters)
    place = names.index("index") - 1 if "index" in names else None

    @functools.wraps(verb)
    def wrapper(self: Accounting, *args: Any) -> Any:
        started = time.monotonic()
        try:
            with torch.no_grad():
                return verb(self, *args)
        finally:
            layer = args[place] if place is not None else None
            self.ledger.add(verb.__name__, layer, time.monotonic() - started, _bytes(args))

    return wrapper


def _bytes(value: Any) -> int:
    """The bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return 0
