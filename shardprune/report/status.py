"""The state of a run, read from the events in its output: running on any machine, finished, or dead."""

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from shardprune.errors import InputError
from shardprune.report.event_kinds import LATEST
from shardprune.report.events import HEARTBEAT_SECONDS, REWRITE_SECONDS, read_events
from shardprune.report.progress import clock_time
from shardprune.storage.retrying import preflight
from shardprune.storage.run_folders import run_folders

SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS + REWRITE_SECONDS  # without events, after which a run counts as dead
ENDS = ("done", "stopped", "failed")
LONGEST = ("prune", "rebuild", "recover", "perplexity after")  # steps after which little or no work is left
Event = dict[str, Any]


@dataclass(frozen=True)
class Status:
    """The state of one run.

    Attributes:
        state: running, done, stopped, failed, or dead (no events for SILENCE_SECONDS).
        started, last: seconds since the epoch, `last` of the last event.
        left: estimated seconds to the end, counted from the last event; None without a basis for it.
    """

    folder: str
    command: str
    state: str
    error: str | None
    phase: str | None
    label: str | None
    detail: str | None
    share: float | None
    layers: int | None
    finished: int | None
    attempts: int
    lost: int
    started: float
    last: float
    left: float | None

    def lines(self, now: float) -> list[str]:
        """Format the status as lines of text."""
        lines = [f"{self.folder}: {self.command}, {self._state(now)}"]
        if self.finished is not None:
            lines.append(f"layers    {self.finished} of {self.layers} finished")
        if self.state != "done" and self.phase:
            parts = [self.phase, *(text for text in (self.label, self.detail) if text and text != self.phase)]
            lines.append(f"{'at' if self.state == 'running' else 'was at':<9} {', '.join(parts)}{self._share()}")
        lost = f", workers lost {self.lost} times" if self.lost else ""
        lines.append(f"attempt   {self.attempts}{lost}; started {_utc(self.started)}")
        lines.append(f"last sign {_utc(self.last)}, {clock_time(max(0.0, now - self.last))} ago")
        if self.state == "running" and self.left is not None:
            ends = self.last + self.left
            lines.append(f"ends      about {_utc(ends)}, in {clock_time(max(0.0, ends - now))}")
        return lines

    def in_short(self) -> str:
        """Format state and place as words."""
        return f"{self.state}{f', {self.phase}' if self.phase else ''}{self._share()}"

    def _share(self) -> str:
        return "" if self.share is None else f", {self.share:.0%}"

    def _state(self, now: float) -> str:
        again = "the same command goes on from there"
        if self.state == "dead":
            return f"no sign of life for {clock_time(now - self.last)}: if it is not running, {again}"
        return {
            "stopped": f"stopped; {again}",
            "failed": f"failed: {self.error}",
        }.get(self.state, self.state)


@preflight()
def status_of(out: str, now: float | None = None) -> list[Status]:
    """Return the status of the runs in an output directory: one, or those of a pipeline's started steps.

    Raises:
        InputError: it holds none.
    """
    read = [(folder, read_events(folder)) for folder in run_folders(out)]
    found = [(folder, events) for folder, events in read if any(event["event"] == "run" for event in events)]
    if not found:
        raise InputError("out", f"{out!r} holds no events of a run; give the output directory of one")
    return [_status(folder.url, events, time.time() if now is None else now) for folder, events in found]


def _status(folder: str, events: list[Event], now: float) -> Status:
    runs = [place for place, event in enumerate(events) if event["event"] == "run"]
    run, attempt, last = events[runs[-1]], events[runs[-1] :], events[-1]
    state = last["event"] if last["event"] in ENDS else "running"
    if state == "running" and now - last["time"] > SILENCE_SECONDS:
        state = "dead"
    position = next((event for event in reversed(attempt) if "total" in event), {})
    phase = _phase(attempt)
    return Status(
        folder=folder,
        command=run.get("command", ""),
        state=state,
        error=last.get("error"),
        phase=phase,
        label=position.get("label"),
        detail=position.get("detail"),
        share=position["done"] / position["total"] if position.get("total") else None,
        layers=run.get("layers"),
        finished=_finished(events),
        attempts=len(runs),
        lost=sum(event["event"] == "lost" for event in events),
        started=run["time"],
        last=last["time"],
        left=_left(events, attempt),
    )


def _phase(attempt: list[Event]) -> str | None:
    """Return the current phase, or the last one."""
    open_phases: list[str] = []
    latest = None
    for event in attempt:
        if event["event"] == "begin":
            open_phases.append(event["phase"])
        elif event["event"] == "end" and event["phase"] in open_phases:
            latest = event["phase"]
            open_phases.remove(latest)
    return open_phases[-1] if open_phases else latest


def _finished(events: list[Event]) -> int | None:
    """Count the finished layers: those that the last attempt found, and its own; None for commands without single
    layers.
    """
    attempts = [place for place, event in enumerate(events) if event["event"] == "attempt"]
    if not attempts:
        return None
    own = {event["layer"] for event in events[attempts[-1] :] if event["event"] == "layer"}
    return len(own.union(events[attempts[-1]]["finished"]))


def _left(events: list[Event], attempt: list[Event]) -> float | None:
    """Estimate the seconds from the last event to the end of the run, from its speed so far."""
    search = _left_of_search(events, attempt)
    structure = [event["event"] for event in attempt if event.get("phase") == "structure"]
    if structure == ["begin"]:  # another run follows
        return None
    step = search if search is not None else _left_of_step(attempt)
    if step is None:
        return None
    left = step + _evaluation_ahead(events, attempt)
    return left if attempt[-1]["time"] + left <= LATEST else None


def _left_of_step(attempt: list[Event]) -> float | None:
    """Estimate the remaining seconds of the current step by its finished parts."""
    positions = [event for event in attempt if "total" in event]
    if not positions or not positions[-1]["total"]:
        return None
    now = positions[-1]
    if now["label"] not in LONGEST:
        return None
    begun = (event for event in reversed(positions) if event["label"] == now["label"] and not event["done"])
    first = next(begun, None)
    if first is None or not now["done"]:
        return None
    elapsed = now["time"] - first["time"]
    left = elapsed * (now["total"] - now["done"]) / now["done"]
    return max(0.0, left - (attempt[-1]["time"] - now["time"]))


def _left_of_search(events: list[Event], attempt: list[Event]) -> float | None:
    """Estimate the remaining seconds of mop by the share of the request that its iterations have removed."""
    shares = [event["share"] for event in events if "share" in event]
    own = [event for event in attempt if "share" in event]
    if not own:
        return None
    before = shares[-len(own) - 1] if len(shares) > len(own) else 0.0
    took = own[-1]["time"] - attempt[0]["time"]
    rate = (own[-1]["share"] - before) / took if took > 0 else 0.0
    return max(0.0, (1 - own[-1]["share"]) / rate - (attempt[-1]["time"] - own[-1]["time"])) if rate > 0 else None


def _evaluation_ahead(events: list[Event], attempt: list[Event]) -> float:
    """Return the expected seconds of the perplexity at the end: those of the perplexity before."""
    if any(str(event.get("label", "")) == "perplexity after" for event in attempt):
        return 0.0
    started: dict[str, float] = {}
    seconds = 0.0
    for event in events:
        if event.get("label") == "perplexity before":
            if not event["done"]:
                started["at"] = event["time"]
            elif event["done"] == event["total"] and "at" in started:
                seconds += event["time"] - started.pop("at")
    return seconds


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
