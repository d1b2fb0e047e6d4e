"""Folders on any file system that fsspec reaches: reads by byte range, writes that are complete or invisible.

Every operation is tried again on transient errors: see `shardprune.storage.retrying`.
"""

import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from glob import has_magic
from typing import Any, TypeVar

from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from shardprune.errors import InputError, StorageError, first_line
from shardprune.storage.json_file import LIMIT, dump_json, parse_json
from shardprune.storage.locations import file_system, protocols_of, refuse_hub
from shardprune.storage.malformed import Malformed
from shardprune.storage.retrying import retry, unhidden
from shardprune.storage.text_file import decode
from shardprune.storage.whole_files import content_of

T = TypeVar("T")

CHUNK = 64 * 2**20  # bytes per read or write call
REQUEST = 16 * 2**20  # bytes of one of several parallel requests
REQUESTS = 8  # in parallel
# Protocols that show a file only when its upload ends; everywhere else `write` needs a temporary name and a rename.
OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oci", "oss", "r2"})
PARTIAL = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")
# Packages whose errors are storage errors, like Python's OSError.
CLIENTS = frozenset(
    {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub", "requests"}
)

Parts = Callable[[], Iterable[bytes | memoryview]]


class Folder:
    """A directory on any file system; all paths given to its methods are relative to it.

    All methods raise StorageError, which names `field`, if storage refuses an operation or stays unreachable, or a file
    is shorter than what is read of it.

    Args:
        url: local path or fsspec URL.
        field: the recipe's field that names the folder, for errors.

    Raises:
        InputError: the URL's file system is unknown or its package is not installed; names `field`.
    """

    def __init__(self, url: str, field: str) -> None:
        self.url = url
        self.field = field  # of the recipe, for errors about files inside
        self.fs, self.root = file_system(url, field)

    def path(self, name: str) -> str:
        return posixpath.join(self.root, name)

    @property
    def appends(self) -> bool:
        """Whether `append_text` works here; most storage takes whole files only."""
        return self.local or "memory" in protocols_of(self.fs)

    @property
    def local(self) -> bool:
        """Whether this is a directory of this machine, as far as the operating system shows."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def _renames(self) -> bool:
        """Whether a file is visible while it is written, so that writing needs a temporary name and a rename."""
        return OBJECT_STORES.isdisjoint(protocols_of(self.fs))

    # -- looking ----------------------------------------------------------------------------------------------

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None if there is no such file."""

        def look() -> int | None:
            try:
                with unhidden():
                    info = self.fs.info(self.path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            if info["size"] is None:
                raise OSError("its server does not say how large it is")
            return int(info["size"]) if info["type"] == "file" else None

        return self._persist("read", name, look)

    def is_file(self, name: str) -> bool:
        return self.size(name) is not None

    def names(self) -> list[str]:
        """Return the names of the files and folders directly inside; empty if the folder does not exist."""
        entries = {entry.rstrip("/") for entry in self._list(detail=False)}
        return sorted(posixpath.basename(entry) for entry in entries - {self.root})

    def infos(self) -> dict[str, dict[str, Any]]:
        """Return what the file system says of every file directly inside, by name: its `size`, and whatever tells its
        versions apart there."""
        return {posixpath.basename(info["name"]): info for info in self._list(detail=True) if info["type"] == "file"}

    def _list(self, detail: bool) -> list[Any]:
        def look() -> list[Any]:
            try:
                return self.fs.ls(self.root, detail=detail, refresh=True)
            except (FileNotFoundError, NotADirectoryError):
                return []

        return self._persist("listed", "", look)

    # -- reading ----------------------------------------------------------------------------------------------

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Read the bytes [start, end) of each (name, start, end), one request each, several in parallel."""
        names, starts, ends = ([*column] for column in zip(*ranges, strict=True))
        paths = [self.path(name) for name in names]

        def read() -> list[bytes]:
            parts = self.fs.cat_ranges(paths, starts, ends, on_error="return")
            if error := next((part for part in parts if isinstance(part, BaseException)), None):
                raise error
            for part, start, end in zip(parts, starts, ends, strict=True):
                if len(part) < end - start:
                    raise _too_short(start + len(part), end - start - len(part))
            return parts

        return self._persist("read", names[0] if len(set(names)) == 1 else "", read)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return self.read_ranges([(name, start, end)])[0]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        if isinstance(self.fs, AsyncFileSystem):
            self._read_by_requests(name, start, buffer)
        else:
            self._persist("read", name, lambda: self._read_as_stream(name, start, buffer))

    def _read_by_requests(self, name: str, start: int, buffer: memoryview) -> None:
        for done in range(0, len(buffer), REQUESTS * REQUEST):
            wanted = min(REQUESTS * REQUEST, len(buffer) - done)
            offsets = range(start + done, start + done + wanted, REQUEST)
            parts = self.read_ranges([(name, at, min(at + REQUEST, start + done + wanted)) for at in offsets])
            for part in parts:
                buffer[done : done + len(part)] = part
                done += len(part)

    def _read_as_stream(self, name: str, start: int, buffer: memoryview) -> None:
        with self.fs.open(self.path(name), "rb", cache_type="none") as file:
            file.seek(start)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done : done + CHUNK])
                if not count:
                    raise _too_short(start + done, len(buffer) - done)
                done += count

    def read_bytes(self, name: str) -> bytes:
        """Return the content of a file; one without an end, as a pipe, or without room in memory cannot be read."""
        return self._persist("read", name, lambda: content_of(self.fs, self.path(name)))

    def read_text(self, name: str) -> str:
        """Return the text of a file without its byte-order mark.

        Raises:
            Malformed: it is in no encoding of Unicode.
        """
        return decode(self.read_bytes(name))

    def read_json(self, name: str, limit: int = LIMIT, *, infinities: bool = False) -> Any:
        """Return the value in a file.

        Args:
            limit: largest size in bytes.
            infinities: see `parse_json`.

        Raises:
            Malformed: it is larger, or `parse_json` refuses it.
        """
        if (size := self.size(name) or 0) > limit:
            raise Malformed(f"is too large for JSON here: {size:,} bytes, at most {limit:,}")
        return parse_json(self.read_bytes(name), limit, infinities=infinities)

    # -- writing ----------------------------------------------------------------------------------------------

    def write(self, name: str, parts: Parts) -> None:
        """Write a file from its parts; no reader sees it before it is complete.

        Object stores show nothing before the upload ends. On other file systems the file gets a temporary name and is
        renamed.

        Args:
            parts: returns all parts from the start; called again for each attempt.
        """
        if self._renames:
            self._persist("written", name, lambda: self._write_and_rename(name, parts()))
            return
        unfinished: list[Any] = []  # uploads that could not be aborted because storage was unreachable

        def upload() -> None:
            while unfinished:
                with suppress(FileNotFoundError):  # the upload completed after all; the new one replaces it
                    unfinished[-1].discard()
                unfinished.pop()
            self._upload(name, parts(), unfinished)

        self._persist("written", name, upload)

    def _upload(self, name: str, parts: Iterable[bytes | memoryview], unfinished: list[Any]) -> None:
        file = self.fs.open(self.path(name), "wb")
        try:
            _fill(file, parts)
            file.close()
        except BaseException:
            file.closed = True  # closing would complete the upload, and so would the destructor
            unfinished.append(file)
            with suppress(Exception):  # the first error is the one to report
                file.discard()
                unfinished.pop()
            raise

    def _write_and_rename(self, name: str, parts: Iterable[bytes | memoryview]) -> None:
        inner = posixpath.dirname(self.path(name))
        path = self.path(f".{posixpath.basename(name)}.{uuid.uuid4().hex[:8]}.tmp")  # where `remove_partial` looks
        self.fs.makedirs(inner, exist_ok=True)
        try:
            with self.fs.open(path, "wb") as file:
                _fill(file, parts)
                if self.local:  # a node that loses power could otherwise keep the name and lose the content
                    file.flush()
                    os.fsync(file.fileno())
            self._move(path, self.path(name))
            if self.local:
                for place in {self.root, inner}:
                    sync_folder(place)
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self.fs.rm_file(path)
            raise

    def _move(self, path: str, place: str) -> None:
        if self.local or not has_magic(path):
            self.fs.mv(path, place)
            return
        self.fs.cp_file(path, place)  # `mv` would take the name for a pattern
        self.fs.rm_file(path)

    def write_bytes(self, name: str, content: bytes) -> None:
        self.write(name, lambda: [content])

    def append_text(self, name: str, text: str) -> None:
        """Append to a file; readers see it grow."""

        start = ""

        def append() -> None:
            nonlocal start
            content, start = start + text, "\n"  # ends a partial line that a failed attempt may have left
            with self.fs.open(self.path(name), "ab") as file:
                file.write(content.encode())

        self._persist("written", name, append)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a value. Numbers that are not finite become null: see `dump_json`."""
        self.write_text(name, dump_json(value, indent=1) + "\n")

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        self._remove(name, lambda: self.fs.rm_file(self.path(name)))

    def remove_folder(self, name: str) -> None:
        """Remove a folder and its content if it exists."""
        path = self.path(name)
        self._remove(name, lambda: self._remove_tree(path) if has_magic(path) else self.fs.rm(path, recursive=True))

    def _remove_tree(self, path: str) -> None:
        """Remove a folder whose name `rm` would take for a pattern, which other runs' names may match."""
        if self.local:
            self.fs.rm(path, recursive=True)  # which takes it as it is
            return
        found = self.fs.find(path, withdirs=True, detail=True)
        folders = [place for place, info in found.items() if info["type"] == "directory"]
        for place in found.keys() - {*folders}:
            self.fs.rm_file(place)
        for place in (*sorted(folders, key=len, reverse=True), path):
            with suppress(OSError):  # object stores have none
                self.fs.rmdir(place)

    def _remove(self, name: str, operation: Callable[[], None]) -> None:
        def remove() -> None:
            with suppress(FileNotFoundError):  # perhaps removed by an attempt whose response was lost
                operation()

        self._persist("removed", name, remove)

    def remove_partial(self) -> None:
        """Remove temporary files that an interrupted `write` left behind."""
        for name in self.names():
            if PARTIAL.fullmatch(name):
                self.remove(name)

    def check_writable(self) -> None:
        """Write a probe file and remove it, together with the folders created for it.

        Raises:
            InputError: the folder cannot be written.
        """
        refuse_hub(self.url, self.field)
        made = self._missing_folders() if self._renames else []
        name = f".probe.{uuid.uuid4().hex[:8]}.tmp"
        try:
            self.write_bytes(name, b"")
            self.remove(name)
        except StorageError as error:
            reason = first_line(error.__cause__ or error)
            raise InputError(self.field, f"{self.url} cannot be written: {reason}") from error
        finally:
            with suppress(Exception):  # not empty any more if another run has written there
                for folder in made:
                    self.fs.rmdir(folder)

    def _missing_folders(self) -> list[str]:
        """Return this folder and those above it that do not exist, innermost first."""
        missing, folder = [], self.root
        while folder != posixpath.dirname(folder) and not self.fs.exists(folder):
            missing.append(folder)
            folder = posixpath.dirname(folder)
        return missing

    # -- inside -----------------------------------------------------------------------------------------------

    def _persist(self, done: str, name: str, operation: Callable[[], T]) -> T:
        """Run an operation, with retries on transient errors.

        Args:
            done: past participle for the error: the file "cannot be `done`".
        """
        place = f"{self.url}/{name}" if name else self.url
        try:
            return retry(operation, place)
        except Exception as error:
            if not of_storage(error):
                raise
            raise StorageError(self.field, f"{place} cannot be {done}: {first_line(error)}") from error


def output_folder(url: str) -> Folder:
    """Open the output directory of a run.

    Raises:
        InputError: as `Folder` does, or the URL is read-only.
    """
    refuse_hub(url, "out")
    return Folder(url, "out")


def sync_folder(path: str) -> None:
    """Flush the entries of a local folder to disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _fill(file: Any, parts: Iterable[bytes | memoryview]) -> None:
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK):
            file.write(view[start : start + CHUNK])


def _too_short(end: int, missing: int) -> OSError:
    """Return the error of a file that is shorter than it was when its size was read."""
    return OSError(f"it ends at byte {end}, {missing} bytes early")


def of_storage(error: Exception) -> bool:
    """Return whether an error comes from a file system or its client; NotImplementedError is that of one
    without the operation."""
    return isinstance(error, OSError | NotImplementedError) or any(
        base.__module__.partition(".")[0] in CLIENTS for base in type(error).__mro__
    )
