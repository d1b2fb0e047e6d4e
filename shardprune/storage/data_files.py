"""JSON files of this machine that the library `datasets` is to read: Arrow's parser ends the process on content that
is deep, and on null in place of the first object."""

import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

from shardprune.storage.malformed import Malformed

DEPTH = 200  # as of other JSON here
ENDINGS = (".json", ".jsonl")
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]|null', re.DOTALL)


def check_data_files(builder: str, *named: Any) -> None:
    """Check that Arrow survives the JSON files of a data set; files that do not lie on this machine are left out.

    Args:
        builder: the first argument of `datasets.load_dataset`: a directory, a name, or `json`, which reads files with
            any ending.
        named: values such as those of `data_files`: paths, patterns and directories, in lists and dictionaries.

    Raises:
        Malformed: one is nested deeper than `DEPTH`, or has null as a row; names the file and the line.
    """
    for name in _texts([builder, *named]):
        for path in map(Path, glob(name, recursive=True)):
            inside = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in inside:
                if file.is_file() and (file.suffix in ENDINGS or (builder == "json" and not path.is_dir())):
                    _check(file)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _check(file: Path) -> None:
    rows = file.suffix == ".jsonl"
    depth = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if rows and line.startswith(b"{") and line.count(b"[") + line.count(b"{") <= DEPTH:
                continue
            for token in _TOKENS.finditer(line):
                depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
                if depth > DEPTH:
                    raise Malformed(f"names {str(file)!r}, which is nested deeper than {DEPTH} at line {number}")
                if depth == 0 and token[0] == b"null":
                    raise Malformed(f"names {str(file)!r}, which has null for a row at line {number}")
            depth = 0 if rows else max(depth, 0)
