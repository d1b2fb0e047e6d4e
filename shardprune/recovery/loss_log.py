"""The loss log of a training run: one line of JSON per step, in a file that grows.

A run that resumes from a checkpoint repeats steps; the last line of a step counts.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shardprune.errors import StorageError
from shardprune.storage.json_file import MaybeMeasurement, dump_json, parse_model
from shardprune.storage.malformed import Malformed

FILE = "losses.jsonl"
AROUND = ("held_out", "checkpoint")  # parts that are no part of the step itself


@dataclass(frozen=True)
class Loss:
    """The record of one step.

    Attributes:
        loss: mean loss of the step's targets, before the update.
        gradient_norm: global norm of the gradient.
        targets: tokens whose predictions enter the loss.
        tokens: all tokens of the step's rows, padding not included.
        seconds: of the step, without checkpoints and held-out rows.
        peak_bytes: the most memory that the first process has taken so far, of its GPU or of the host.
        held_out: mean loss of the held-out rows after the update; None if it was not measured.
        parts: seconds by part, of the first process: see `PartClock`; and beside the step's own `held_out`, and the
            `checkpoint` that was written behind it.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    targets: int
    tokens: int
    seconds: float
    peak_bytes: int
    held_out: MaybeMeasurement = None
    parts: dict[str, float] = field(default_factory=dict)


class Losses:
    """The loss log in a training run's directory."""

    def __init__(self, directory: str) -> None:
        self._file = Path(directory) / FILE

    def append(self, loss: Loss) -> None:
        values = {name: value for name, value in asdict(loss).items() if value is not None}
        with self._file.open("a") as file:  # one short write: a kill leaves at most one partial line
            file.write(dump_json(values) + "\n")

    def mend(self) -> None:
        """Drop a partial last line, as a killed process leaves it."""
        if self._file.exists():
            content = self._file.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self._file, whole)

    def read(self) -> list[Loss]:
        """Return the last record of every step, in the order of steps.

        Raises:
            StorageError: a line is no record; names the recipe's field `state`.
        """
        if not self._file.exists():
            return []
        records = {}
        for number, line in enumerate(self._file.read_bytes().split(b"\n")[:-1], 1):  # the last may be written just now
            try:
                loss = parse_model(line, Loss)
            except Malformed as error:
                raise StorageError("state", f"{self._file} line {number} {error}") from error
            records[loss.step] = loss
        return [records[step] for step in sorted(records)]


def own_parts(loss: Loss) -> list[tuple[str, float]]:
    """Return the parts of a step itself with their seconds, without what belongs to its intervals."""
    return [(name, seconds) for name, seconds in loss.parts.items() if name not in AROUND]


def parts_of(losses: Iterable[Loss]) -> dict[str, float]:
    """Return the seconds by part of all steps; `other` is what no part of a step accounts for."""
    sums: dict[str, float] = defaultdict(float)
    for loss in losses:
        for name, seconds in loss.parts.items():
            sums[name] += seconds
        sums["other"] += max(0.0, loss.seconds - sum(seconds for _, seconds in own_parts(loss)))
    return {name: round(seconds, 3) for name, seconds in sums.items()}
