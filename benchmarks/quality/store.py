"""Measured rows in files, one each, so that a benchmark that is cut off goes on after the last one."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Place = tuple[str, ...]  # of a row: its model, text and setting


@dataclass(frozen=True)
class Measured:
    """One row: `perplexity` after pruning, seconds and passes of the method alone, the `sparsity` achieved, and the
    accuracies on pairs of sentences by task, if any were asked for."""

    perplexity: float
    seconds: float
    passes: float
    sparsity: float
    accuracies: dict[str, float] = field(default_factory=dict)


class Store:
    """The rows below a folder, each under the hash of all that decides it: rows of several names that are the same
    recipe are one, and a row whose recipe is another now counts as not measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, place: Place, decided: Mapping[str, Any]) -> Measured | None:
        """Return the row at a place that so much decides, if it was measured."""
        file = self._file(place, decided)
        return Measured(**json.loads(file.read_text())["measured"]) if file.exists() else None

    def keep(self, place: Place, decided: Mapping[str, Any], measured: Measured) -> None:
        """Write a row; no reader sees it before it is complete."""
        file = self._file(place, decided)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"measured": asdict(measured), "decided by": decided}, indent=1) + "\n")
        partial.rename(file)

    def _file(self, place: Place, decided: Mapping[str, Any]) -> Path:
        return self.folder.joinpath(*map(_plain, place), f"{digest(decided)}.json")


def digest(decided: Mapping[str, Any]) -> str:
    """Return a short hash of plain data."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-+" else "_" for letter in name)
