"""The losses of a training: one line of JSON a step, in a file that grows while it runs.

A training that goes on from a checkpoint repeats steps; the last line of a step counts.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from shardprune.report.events import whole_lines

FILE = "losses.jsonl"


@dataclass(frozen=True)
class Loss:
    """What is known after a step: the mean loss of its targets before the step changed the weights, the rate and the
    norm of the gradient, and the mean loss of the held-out rows after it, where it was measured."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    targets: int
    held_out: float | None = None


class Losses:
    """The losses that a training's directory holds."""

    def __init__(self, directory: str) -> None:
        self._file = Path(directory) / FILE

    def append(self, loss: Loss) -> None:
        values = {name: value for name, value in asdict(loss).items() if value is not None}
        with self._file.open("a") as file:  # one short write: a kill leaves at most a line without an end
            file.write(json.dumps(values) + "\n")

    def mend(self) -> None:
        """Drop a line that a kill cut off."""
        if self._file.exists():
            text = self._file.read_text()
            whole = whole_lines(text)
            if whole != text:
                os.truncate(self._file, len(whole.encode()))

    def read(self) -> list[Loss]:
        """The last record of every step, in their order."""
        if not self._file.exists():
            return []
        lines = whole_lines(self._file.read_text()).splitlines()
        records = {record["step"]: Loss(**record) for record in map(json.loads, lines)}
        return [records[step] for step in sorted(records)]
