"""What a run takes: its forward passes, counted in the events that it leaves, and its seconds."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardprune.report.events import Events, read_events
from shardprune.shard.error_curves import ErrorCurves
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.ledger import OF_ONE_WAVE
from shardprune.solvers.training import STEP_TOKENS
from shardprune.storage.folder import Folder

# Phases that do not belong to what a method takes: they are the same in every row.
APART = {"plan", "load", "write", "evaluate", "generate", "total"}
# Passes of a call that brings gradients back: the forward pass again, and the backward pass, which counts as two.
BACK = {ErrorCurves.backward.__name__: 3, ErrorCurves.differentiate.__name__: 3}


def training_passes(steps: int, samples: int, seqlen: int) -> float:
    """Return the passes of training every layer for so many steps: a backward pass counts as two."""
    return 3 * steps * min(samples, max(1, STEP_TOKENS // seqlen)) / samples


def passes_of(out: Path, layers: int, samples: int, wave: int) -> float:
    """Return how many times the calibration windows have passed through all layers: calls that carry a wave through
    the layer that they name, or through those of a shard."""
    phases: list[str] = []
    by_layer, by_shard, shards = 0, 0, 1
    for event in read_events(Folder(str(out), "out")):
        if event["event"] == "begin":
            phases.append(event["phase"])
        elif event["event"] == "end" and event["phase"] in phases:
            phases.remove(event["phase"])
        elif event["event"] == "work":
            shards = max(shards, event["shard"] + 1)
            if APART.isdisjoint(phases):
                for verb, layer, _, _, _, calls, _, kind in event["spans"]:
                    by_layer += calls * BACK.get(verb, 1) * (layer is not None and kind in OF_ONE_WAVE)
                    of_shard = verb in (ForwardWorker.forward.__name__, ErrorCurves.backward.__name__)
                    by_shard += calls * BACK.get(verb, 1) * of_shard
    return (by_layer / layers + by_shard / shards) / -(-samples // wave)


class CpuSeconds(Events):
    """Events of runs in this process, by which the CPU time of its phases is known: unlike the time on the wall, it
    does not depend on what else the machine does."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def emit(self, event: str, **fields: Any) -> None:
        super().emit(event, **fields)
        now = time.process_time()
        if event == "begin":
            self._began[fields["phase"]] = now
        elif event == "end":
            phase = fields["phase"]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._began[phase]


def method_seconds(seconds: Mapping[str, float]) -> float:
    """Return the seconds of what a method takes, of those of all phases."""
    return sum(value for phase, value in seconds.items() if phase not in APART)
