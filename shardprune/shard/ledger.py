"""Per-worker call statistics, for the result, the timeline and metrics."""

import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

# What a verb's calls do:
#   read        layers from storage
#   forward     one wave through layers, or through the head
#   statistics  one wave through a layer or block, whose inputs or gradients add to sums
#   propagate   one kept wave through a layer, whose image takes its place
#   solve       from sums to weights, masks and ratios
#   write       a layer's file
#   exchange    waves, sums and weights that go from worker to worker, and what a worker keeps
Kind = Literal["read", "forward", "statistics", "propagate", "solve", "write", "exchange"]
OF_ONE_WAVE: frozenset[Kind] = frozenset({"forward", "statistics", "propagate"})  # one call, one wave

PAUSE_SECONDS = 1.0  # between two calls of a verb, from which on they count as two spans


@dataclass
class Span:
    """The calls of one verb for one layer (None: for none in particular) between two accounts, with no pause between
    them that is longer than PAUSE_SECONDS.

    `start` and `end` are seconds since the epoch on the worker's clock, `busy` the seconds of the calls alone, `bytes`
    what tensors the calls brought to the worker.
    """

    verb: str
    kind: Kind
    layer: int | None
    start: float
    end: float
    busy: float = 0.0
    calls: int = 0
    bytes: int = 0

    def plain(self) -> list[Any]:
        """As a row of plain values: verb, layer, start, end, busy, calls, bytes, kind."""
        times = (round(self.start, 3), round(self.end, 3), round(self.busy, 4))
        return [self.verb, self.layer, *times, self.calls, self.bytes, self.kind]


class Watcher(Protocol):
    """A function that is called with every call of a verb as it ends."""

    def __call__(self, verb: str, kind: Kind, seconds: float, received: int) -> None: ...


class Ledger:
    """What a worker did since it started, by verb, and the spans since the last account."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.watcher: Watcher | None = None
        self._spans: dict[tuple[str, int | None], Span] = {}  # to which calls may be added
        self._closed: list[Span] = []

    def add(self, verb: str, kind: Kind, layer: int | None, seconds: float, received: int) -> None:
        """A call has ended."""
        self.seconds[verb] = self.seconds.get(verb, 0.0) + seconds
        now = time.time()
        span = self._spans.get((verb, layer))
        if span is None or now - seconds - span.end > PAUSE_SECONDS:
            if span:
                self._closed.append(span)
            span = self._spans[verb, layer] = Span(verb, kind, layer, now - seconds, now)
        span.end = now
        span.busy += seconds
        span.calls += 1
        span.bytes += received
        if self.watcher:
            self.watcher(verb, kind, seconds, received)

    def hand_out(self) -> list[Span]:
        """The spans since the last time, in the order of their starts."""
        spans = sorted([*self._closed, *self._spans.values()], key=lambda span: span.start)
        self._spans, self._closed = {}, []
        return spans
