"""The timeline of a run from its events: attempts, phases, and the work of every worker."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shardprune.printable import without_folders
from shardprune.report.page.workers import Key

Event = dict[str, Any]

TRAINING_PHASE = "recover"  # whose processes have no ledger
TRAINING = "train"  # the kind of work that they count as doing throughout
UNKNOWN = "exchange"  # the kind of work of an older version's spans, which do not say it


@dataclass(frozen=True)
class Work:
    """Consecutive calls of verbs of one kind: `start` and `end` are seconds since the epoch, of which `busy` seconds
    were computation."""

    kind: str
    start: float
    end: float
    busy: float


@dataclass(frozen=True)
class Interruption:
    """A loss of workers or of the driver; a new driver resumed after `silent` seconds."""

    time: float
    what: str
    silent: float = 0.0
    new_driver: bool = False


@dataclass(frozen=True)
class Stint:
    """The work of one worker from its start to its loss or to the `end` of the workers' part of the run, in order of
    time.
    """

    key: Key
    work: tuple[Work, ...]
    end: float

    @property
    def start(self) -> float:
        return min(entry.start for entry in self.work)


class History:
    """A run's events in order, as intervals of time.

    Args:
        trainers: the processes of a training run, which worked throughout the phase.
    """

    def __init__(self, events: list[Event], trainers: Iterable[Key] = ()) -> None:
        self.events = events
        self.interruptions = [*self._losses(), *self._restarts()]
        self.interruptions.sort(key=lambda entry: entry.time)
        self.phases = self._phases()
        self.stints = self._stints(tuple(trainers))

    @property
    def start(self) -> float:
        return self.events[0]["time"]

    @property
    def end(self) -> float:
        return self.events[-1]["time"]

    def at(self, time: float) -> float:
        """Convert a time to seconds of the run, without the gaps between one driver's end and the next one's start."""
        silent = sum(min(entry.silent, time - entry.time) for entry in self.interruptions if entry.time < time)
        return max(0.0, time - self.start - silent)

    def _losses(self) -> list[Interruption]:
        return [
            Interruption(event["time"], f"workers lost: {without_folders(event.get('reason', ''))}")
            for event in self.events
            if event["event"] == "lost"
        ]

    def _restarts(self) -> list[Interruption]:
        """Return the restarts by a new driver, found by its event `run`."""
        found = []
        runs = [place for place, event in enumerate(self.events) if event["event"] == "run"]
        for earlier, run in pairwise(runs):
            begin = next((at for at in range(run, earlier, -1) if _plans(self.events[at])), run)
            before, event = self.events[begin - 1], self.events[begin]
            silent = max(0.0, event["time"] - before["time"])
            found.append(Interruption(before["time"], "the command started again", silent, new_driver=True))
        return found

    def _phases(self) -> list[tuple[str, float, float]]:
        """Return name, start and end of the innermost phases."""
        found: list[tuple[str, float, float]] = []
        stack: list[str] = []
        since = self.start
        ends = iter(entry.time for entry in self.interruptions if entry.new_driver)
        cut = next(ends, None)
        for event in self.events:
            if cut is not None and event["time"] > cut:
                if stack:
                    found.append((stack[-1], since, cut))
                stack, since, cut = [], event["time"], next(ends, None)
            if event["event"] not in ("begin", "end"):
                continue
            if stack:
                found.append((stack[-1], since, event["time"]))
            since = event["time"]
            if event["event"] == "begin":
                stack.append(event["phase"])
            elif event["phase"] in stack:
                del stack[stack.index(event["phase"]) :]
        return [(name, start, end) for name, start, end in found if end > start]

    def _stints(self, trainers: tuple[Key, ...]) -> list[Stint]:
        """Return the work of all workers; after an interruption all workers are new."""
        bounds = [*(entry.time for entry in self.interruptions), float("inf")]
        spans: dict[tuple[int, Key], list[Work]] = {}
        ends: dict[int, float] = {}
        for key, work in self._work(trainers):
            part = next(place for place, bound in enumerate(bounds) if work.start <= bound)
            spans.setdefault((part, key), []).append(work)
            ends[part] = max(ends.get(part, 0.0), work.end)
        return [
            Stint(key, tuple(sorted(work, key=lambda entry: entry.start)), ends[part])
            for (part, key), work in spans.items()
        ]

    def _work(self, trainers: tuple[Key, ...]) -> Iterator[tuple[Key, Work]]:
        """Yield the work of every worker, in no particular order."""
        for event in self.events:
            if event["event"] == "work":
                for _, _, start, end, busy, *rest in event["spans"]:
                    yield (event["shard"], event["replica"]), Work(_kind(rest), start, end, busy)
        for name, start, end in self.phases:
            if name == TRAINING_PHASE:
                for key in trainers:
                    yield key, Work(TRAINING, start, end, end - start)


def _kind(rest: list[Any]) -> str:
    """The kind of work of a span, from the fields after `busy`: calls, bytes and kind."""
    return rest[2] if len(rest) > 2 else UNKNOWN


def _plans(event: Event) -> bool:
    return event["event"] == "begin" and event["phase"] == "plan"
