"""Who looks at an output directory all the while: no file under a layer's name may ever be less than whole."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import read_header
from shardprune.storage.seals import KEY


@contextmanager
def watched(out: Path) -> Iterator[dict[str, int]]:
    """The layer files of an output directory with the time at which each was written, as they appear.

    Raises:
        AssertionError: one of them was not whole, or was written again.
    """
    seen: dict[str, int] = {}
    whole: dict[str, tuple[int, int, int]] = {}
    wrong: list[str] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            try:
                paths = list(out.glob("model-*"))
            except FileNotFoundError:  # what tries whether the directory can be written removes it again
                continue
            try:
                for path in paths:
                    found = path.stat()
                    if seen.setdefault(path.name, found.st_mtime_ns) != found.st_mtime_ns:
                        wrong.append(f"{path.name} was written again")
                    # Looking at what has not changed would take a core of its own.
                    if whole.get(path.name) != (found.st_mtime_ns, found.st_size, found.st_ino):
                        read_header(Folder(str(out), "out"), path.name)  # checks the file against its header
                        whole[path.name] = found.st_mtime_ns, found.st_size, found.st_ino
            except Exception as error:  # whatever a reader would have met
                wrong.append(f"{type(error).__name__}: {error}")

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()
    assert not wrong, wrong


def fingerprints(out: Path) -> set[str]:
    """Of all layer files of an output."""
    folder = Folder(str(out), "out")
    headers = [read_header(folder, name)[1] for name in folder.names() if name.startswith("model-")]
    return {json.loads(metadata[KEY])["fingerprint"] for metadata in headers if KEY in metadata}
