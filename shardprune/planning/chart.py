"""A text chart of a simulated run: the kind of work of every worker over time."""

from typing import Any

from shardprune.planning.simulated_worker import Stretch
from shardprune.planning.simulation import SimulatedGroup
from shardprune.shard.ledger import Kind

WIDTH = 60  # columns of a timeline
LINES = 16  # workers that are shown one by one; of more, each line is the mean of several

# A column of the chart shows the kind of work that took most of its time.
MARKS: dict[Kind, str] = {
    "forward": "f",
    "statistics": "a",
    "solve": "S",
    "propagate": "p",
    "exchange": "x",
    "read": "r",
    "write": "w",
}
IDLE = "."
LEGEND = " ".join(f"{mark}={kind}" for kind, mark in MARKS.items()) + f" {IDLE}=idle"


def idle_share(group: SimulatedGroup) -> float:
    """Return the fraction of all workers' time in which they neither compute, read nor exchange anything."""
    if not group.seconds:
        return 0.0
    shares = [(worker.busy + worker.reading) / group.seconds for worker in group.workers.values()]
    return 1 - sum(shares) / len(shares)


def rows_of(group: SimulatedGroup) -> list[dict[str, Any]]:
    """Return every worker's idle fraction, and its seconds by verb."""
    rows = []
    for (shard, replica), worker in group.workers.items():
        seconds: dict[str, float] = {}
        for span in worker.spans:
            seconds[span.verb] = seconds.get(span.verb, 0.0) + span.end - span.start
        idle = 1 - (worker.busy + worker.reading) / group.seconds if group.seconds else 0.0
        rows.append({"shard": shard, "replica": replica, "idle": idle, "seconds": seconds})
    return rows


def timeline(group: SimulatedGroup) -> list[tuple[str, str, float]]:
    """Return the lines of a chart: the workers' names, their marks from left to right, and their idle fraction."""
    keys = sorted(group.workers)
    per_line = -(-len(keys) // LINES)
    lines = []
    for start in range(0, len(keys), per_line):
        together = keys[start : start + per_line]
        first, last = together[0], together[-1]
        label = f"{first[0]}.{first[1]}" + ("" if first == last else f" to {last[0]}.{last[1]}")
        workers = [group.workers[key] for key in together]
        idle = 1 - sum(worker.busy + worker.reading for worker in workers) / (len(workers) * (group.seconds or 1))
        lines.append((label, _chart([span for worker in workers for span in worker.spans], len(workers), group), idle))
    return lines


def _chart(spans: list[Stretch], workers: int, group: SimulatedGroup) -> str:
    """Return for each column the mark of the work that took most of its time; idle if the workers were busy for less
    than half of it."""
    column = group.seconds / WIDTH or 1.0
    took: list[dict[str, float]] = [{} for _ in range(WIDTH)]
    for span in spans:
        mark = MARKS[span.kind]
        for place in range(int(span.start / column), min(WIDTH, int(span.end / column) + 1)):
            share = min(span.end, (place + 1) * column) - max(span.start, place * column)
            took[place][mark] = took[place].get(mark, 0.0) + max(0.0, share)
    return "".join(_mark(marks, column * workers) for marks in took)


def _mark(marks: dict[str, float], whole: float) -> str:
    if sum(marks.values()) < whole / 2:
        return IDLE
    return max(marks, key=lambda mark: marks[mark])
