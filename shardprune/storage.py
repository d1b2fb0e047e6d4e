"""Files anywhere fsspec reaches: local paths and URLs, read by ranges, written whole or not at all."""

import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterable
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from shardprune.errors import InputError

CHUNK = 64 * 2**20  # bytes per read or write call
# Where a file shows only when its upload ends. Everywhere else it is written under another name and renamed.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oci", "oss", "r2"})
PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


class Folder:
    """A directory on any file system. Every path given to its methods is relative to it.

    Raises:
        InputError: the URL's file system is not known, lacks its package, or cannot be reached; names `field`.
    """

    def __init__(self, url: str, field: str) -> None:
        self.url = url
        self.field = field  # of the recipe, for errors about what lies inside
        self.fs, self.root = _resolve(url, field)

    def path(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def is_file(self, name: str) -> bool:
        return bool(self.fs.isfile(self.path(name)))

    def size(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def names(self) -> list[str]:
        """Names of the files and folders directly inside; none where the folder does not exist."""
        try:
            entries = self.fs.ls(self.root, detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(entry.rstrip("/")) for entry in entries)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path(name), start=start, end=end)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on.

        Raises:
            EOFError: the file ends first.
        """
        with self.fs.open(self.path(name), "rb", cache_type="none") as file:
            file.seek(start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done : done + CHUNK])
                if not count:
                    raise EOFError(f"{name} ends at byte {start + done}, {len(buffer) - done} bytes early")
                done += count

    def read_bytes(self, name: str) -> bytes:
        return self.fs.cat_file(self.path(name))

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_text(name))

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        """Write a file from its parts. No reader ever sees it before it is complete.

        Where a file shows while it is written, it is written under a temporary name and renamed;
        object stores show nothing before the upload ends.
        """
        target = self.path(name)
        renames = self.appends
        path = self.path(f".{name}.{uuid.uuid4().hex[:8]}.tmp") if renames else target
        if renames:
            self.fs.makedirs(self.root, exist_ok=True)
        file = self.fs.open(path, "wb")
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), CHUNK):
                    file.write(view[start : start + CHUNK])
        except BaseException:
            if renames:
                file.close()
                self.fs.rm_file(path)
            else:  # closing would complete the upload, and so would the destructor of an open file
                file.discard()
                file.closed = True
            raise
        file.close()
        if renames:
            self.fs.mv(path, target)

    @property
    def appends(self) -> bool:
        """Whether `append_text` works here; object stores take whole files only."""
        return OBJECT_STORES.isdisjoint(_protocols(self.fs))

    def append_text(self, name: str, text: str) -> None:
        """Add to the end of a file, which readers see grow."""
        with self.fs.open(self.path(name), "ab") as file:
            file.write(text.encode())

    def write_text(self, name: str, text: str) -> None:
        self.write(name, [text.encode()])

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def remove(self, name: str) -> None:
        self.fs.rm_file(self.path(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder with all that it holds, if it is there."""
        if self.fs.isdir(self.path(name)):
            self.fs.rm(self.path(name), recursive=True)

    def remove_partial(self) -> None:
        """Remove what an interrupted `write` left behind."""
        for name in self.names():
            if PARTIAL.fullmatch(name):
                self.remove(name)


def in_process_only(url: str) -> bool:
    """Whether a URL lives in one process's memory, out of reach of other workers."""
    return url.startswith("memory://")


def absolute(url: str) -> str:
    """A local path as an absolute one, so that it means the same to every process; a URL as it is."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def read_file(url: str, field: str) -> bytes:
    """The bytes of one file.

    Raises:
        InputError: it cannot be read; names `field`.
    """
    fs, path = _resolve(url, field)
    try:
        return fs.cat_file(path)
    except FileNotFoundError as error:
        raise InputError(field, f"{url!r} does not exist") from error
    except OSError as error:
        raise InputError(field, f"{url!r} cannot be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """An error's text, or its first line where it has several."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _resolve(url: str, field: str) -> tuple[AbstractFileSystem, str]:
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError, OSError) as error:
        raise InputError(field, f"{url!r} cannot be opened: {first_line(error)}") from error
    return fs, root.rstrip("/") or root


def _protocols(fs: AbstractFileSystem) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
