"""Per-worker call statistics, for the result, the timeline and metrics."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from shardprune.shard.clocks import Clock, HostClock
from shardprune.shard.signs import Calls

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

CALLS_AHEAD = 3  # calls that have returned and may not be done yet
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


@dataclass(frozen=True)
class _Call:
    """A call that has returned, between two marks of the worker's clock."""

    verb: str
    kind: Kind
    layer: int | None
    received: int
    started: Any
    ended: Any


class Ledger:
    """What a worker did since it started, by verb, and the spans since the last account.

    A call on a GPU returns before its work is done. It is entered when that has been done; at most CALLS_AHEAD calls
    are not, so that whoever sends calls by the returns of earlier ones cannot run away from the device.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.watcher: Watcher | None = None
        self.calls = Calls()  # the one under way
        self._clock: Clock = clock or HostClock()
        self._seconds: dict[str, float] = {}
        self._under_way: deque[_Call] = deque()
        self._spans: dict[tuple[str, int | None], Span] = {}  # to which calls may be added
        self._closed: list[Span] = []

    def begin(self) -> Any:
        """Return the mark at which a call begins."""
        while len(self._under_way) >= CALLS_AHEAD:
            self._enter_first()
        return self._clock.mark()

    def end(self, verb: str, kind: Kind, layer: int | None, started: Any, received: int) -> None:
        """Note a call that returns; `started` is what `begin` has returned."""
        self._under_way.append(_Call(verb, kind, layer, received, started, self._clock.mark()))
        while self._under_way and self._clock.has_come(self._under_way[0].ended):
            self._enter_first()

    def add(self, verb: str, kind: Kind, layer: int | None, seconds: float, received: int) -> None:
        """Enter a call that is over."""
        self._enter(verb, kind, layer, time.time(), seconds, received)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all calls by verb, once they are done."""
        self._settle()
        return dict(self._seconds)

    def hand_out(self) -> list[Span]:
        """Return the spans since the last time, in the order of their starts, once their calls are done."""
        self._settle()
        spans = sorted([*self._closed, *self._spans.values()], key=lambda span: span.start)
        self._spans, self._closed = {}, []
        return spans

    def _settle(self) -> None:
        while self._under_way:
            self._enter_first()

    def _enter_first(self) -> None:
        """Wait for the oldest call that is under way, and enter it."""
        call, clock = self._under_way.popleft(), self._clock
        if not clock.has_come(call.ended):
            clock.wait(call.ended)
        seconds, ended = clock.seconds(call.started, call.ended), clock.time(call.ended)
        clock.give_back(call.started, call.ended)
        self._enter(call.verb, call.kind, call.layer, ended, seconds, call.received)

    def _enter(self, verb: str, kind: Kind, layer: int | None, ended: float, seconds: float, received: int) -> None:
        self._seconds[verb] = self._seconds.get(verb, 0.0) + seconds
        span = self._spans.get((verb, layer))
        if span is None or ended - seconds - span.end > PAUSE_SECONDS:
            if span:
                self._closed.append(span)
            span = self._spans[verb, layer] = Span(verb, kind, layer, ended - seconds, ended)
        span.end = ended
        span.busy += seconds
        span.calls += 1
        span.bytes += received
        if self.watcher:
            self.watcher(verb, kind, seconds, received)
