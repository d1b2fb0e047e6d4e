"""The running Python's standard library as a corpus, which every machine has."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

# Tests are absent from most distributions, encodings are tables of numbers, and third-party packages
# are no part of the library. `_sysconfigdata` records how this machine's Python was built.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
)
HELDOUT_BUCKETS = 16  # one bucket in sixteen is held out


def split_of(module: str) -> Split:
    """Return the split of a module, by a hash of its dotted name: the same on every machine and Python version."""
    bucket = hashlib.sha256(module.encode()).digest()[0] % HELDOUT_BUCKETS
    return "heldout" if bucket == 0 else "train"


def modules(split: Split) -> Iterator[tuple[str, Path]]:
    """Yield the dotted names and source files of one split's modules, sorted by name."""
    root = sysconfig.get_path("stdlib")
    named = {}
    for folder, folders, files in os.walk(root):
        # Not entered: most of all files are third-party packages.
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        package = [] if folder == root else os.path.relpath(folder, root).split(os.sep)
        for file in files:
            if file.endswith(".py") and "_sysconfigdata" not in file:
                named[".".join([*package, file.removesuffix(".py")])] = Path(folder, file)
    for name in sorted(named):
        if split_of(name) == split:
            yield name, named[name]


def documents(split: Split) -> list[str]:
    """Return the source text of every module of one split."""
    return [path.read_text(encoding="utf-8", errors="replace") for _, path in modules(split)]
