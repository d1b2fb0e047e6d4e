"""Measured rows in files, one each, so that a benchmark that is cut off goes on after the last one."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One row: `perplexity` after pruning, seconds and passes of the method alone, and the `sparsity` achieved."""

    perplexity: float
    seconds: float
    passes: float
    sparsity: float


class Store:
    """The rows below a folder. A row whose recipe is another now counts as not measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, place: tuple[str, ...], recipe: dict[str, Any]) -> Measured | None:
        """Return the row at a place, if it was measured by this recipe."""
        file = self._file(place)
        if not file.exists():
            return None
        found = json.loads(file.read_text())
        return Measured(**found["measured"]) if found["recipe"] == _digest(recipe) else None

    def keep(self, place: tuple[str, ...], recipe: dict[str, Any], measured: Measured) -> None:
        """Write a row; no reader sees it before it is complete."""
        file = self._file(place)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps({"recipe": _digest(recipe), "measured": asdict(measured)}, indent=1) + "\n")
        partial.rename(file)

    def _file(self, place: tuple[str, ...]) -> Path:
        names = ["".join(letter if letter.isalnum() or letter in ".-+" else "_" for letter in part) for part in place]
        return self.folder.joinpath(*names[:-1], f"{names[-1]}.json")


def _digest(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
