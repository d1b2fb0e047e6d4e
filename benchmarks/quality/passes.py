"""Forward passes of a run, counted in the events that it leaves."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shardprune.report.events import read_events
from shardprune.shard.ledger import OF_ONE_WAVE
from shardprune.storage.folder import Folder

# Phases that do not belong to what a method takes: they are the same in every row.
APART = {"plan", "load", "write", "evaluate", "generate", "total"}


def passes_of(out: Path, layers: int, samples: int, wave: int) -> float:
    """Return how many times the calibration windows have passed through all layers on one worker: calls that carry one
    wave, through the layer that they name, or through all."""
    waves = -(-samples // wave)
    return sum(count / layers if layer is not None else count for layer, count in _calls(out)) / waves


def _calls(out: Path) -> Iterable[tuple[int | None, int]]:
    """Yield the layer and the number of calls that carry a wave, of every span outside of the phases apart."""
    phases: list[str] = []
    event: dict[str, Any]
    for event in read_events(Folder(str(out), "out")):
        if event["event"] == "begin":
            phases.append(event["phase"])
        elif event["event"] == "end" and event["phase"] in phases:
            phases.remove(event["phase"])
        elif event["event"] == "work" and not APART.intersection(phases):
            for _, layer, _, _, _, calls, _, kind in event["spans"]:
                if kind in OF_ONE_WAVE:
                    yield layer, calls


def method_seconds(seconds: dict[str, float]) -> float:
    """Return the seconds of what a method takes, of those of all phases."""
    return sum(value for phase, value in seconds.items() if phase not in APART)
