"""Rows of results: one line of JSON each while a step runs, one JSON file and one Markdown table after each step."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

Value = str | int | float | bool


@dataclass(frozen=True)
class Row:
    """One result of a step: `ok` is False where it shows a fault, True where a check passed, None where it only
    measures."""

    step: str
    name: str
    value: Value
    unit: str = ""
    ok: bool | None = None


class Rows:
    """The results of one step, each in its file as soon as it is known: a step that is killed leaves what it had."""

    def __init__(self, step: str, file: IO[str]) -> None:
        self._step, self._file = step, file

    def add(self, name: str, value: Value, unit: str = "", ok: bool | None = None) -> None:
        print(json.dumps(asdict(Row(self._step, name, value, unit, ok))), file=self._file, flush=True)


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a step's file; a line that was cut off in the middle counts as not written."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(Row(**json.loads(line)))
        except ValueError:
            break
    return rows


def write_results(out: Path, rows: list[Row]) -> None:
    """Write gpu.json and gpu.md into a directory."""
    (out / "gpu.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    lines = ["| step | result | value | |", "|---|---|---|---|"]
    for row in rows:
        mark = {True: "ok", False: "**FAILED**", None: ""}[row.ok]
        lines.append(f"| {row.step} | {_cell(row.name)} | {_cell(_text(row.value))} {row.unit} | {mark} |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


def _text(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
