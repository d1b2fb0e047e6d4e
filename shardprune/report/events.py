"""The event log of a run, one line of JSON each in its output's `events.jsonl`, for `shardprune status` and reports.

`report.event_kinds` has the events and their fields.

A thread of its own writes them, so that a run never waits for the log. Nothing resumes from events: layer files and
run.json are the record.
"""

import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from shardprune.errors import StorageError, first_line
from shardprune.printable import message
from shardprune.report.event_kinds import event_of
from shardprune.signals import stopping
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import dump_json
from shardprune.storage.output_names import EVENTS as FILE

HEARTBEAT_SECONDS = 15.0  # between two heartbeats of a running command
REWRITE_SECONDS = 10.0  # between two rewrites of the file on storage without append
PACKAGES = ("shardprune", "torch", "transformers", "ray")  # whose versions a run records
CLOSE_SECONDS = 10.0  # to wait for the last events to be written; storage may be unreachable

_logger = logging.getLogger(__name__)


class Events:
    """The events of a run; those before it has an output folder are kept until it has one."""

    def __init__(self) -> None:
        self.position: Callable[[], dict[str, Any] | None] = lambda: None  # of the current step
        self.recorded_any = False  # stays False for a run that was already finished
        self._waiting: list[str] = []
        self._writer: _Writer | None = None
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        """Record an event; thread-safe."""
        with self._lock:
            self._waiting.append(dump_json({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
        if self._writer:
            self._writer.wake.set()

    def take(self) -> str:
        """Return the lines emitted since the last call."""
        with self._lock:
            lines, self._waiting = self._waiting, []
        return "".join(lines)

    @contextmanager
    def recorded(self, folder: Folder, **facts: Any) -> Iterator[None]:
        """Write events to a folder for the duration of the block, after those of earlier attempts.

        Nested blocks write to the outer block's file.

        Args:
            facts: fields of the event `run`.
        """
        if self._writer:
            yield
            return
        self.recorded_any = True
        self._writer = _Writer(self, folder)
        self._writer.start()
        try:
            self.emit("run", **facts, versions=_versions(), machine=_machine())
            yield
            self.emit("done")
        except BaseException as error:
            if stopping() or isinstance(error, KeyboardInterrupt):
                self.emit("stopped")
            else:
                self.emit("failed", error=message(f"{type(error).__name__}: {first_line(error)}"))
            raise
        finally:
            writer, self._writer = self._writer, None
            writer.close()


class _Writer(threading.Thread):
    """A thread that writes new events, and a heartbeat if there are none.

    The file is appended to if storage allows it, else rewritten every REWRITE_SECONDS.
    """

    def __init__(self, events: Events, folder: Folder) -> None:
        super().__init__(daemon=True)
        self.wake = threading.Event()
        self._events, self._folder = events, folder
        self._over = threading.Event()
        self._text = whole_lines(_text(folder)) if folder.is_file(FILE) else ""
        if folder.appends and self._text:  # without the partial line of a killed driver
            folder.write_text(FILE, self._text)
        self._left = ""  # not written yet

    def run(self) -> None:
        while not self._over.is_set():
            if not self.wake.wait(HEARTBEAT_SECONDS):
                self._events.emit("progress", **(self._events.position() or {}))
            self.wake.clear()
            self._write()
            if not self._folder.appends:
                self._over.wait(REWRITE_SECONDS)
        self._write()

    def close(self) -> None:
        """Write the remaining events and stop."""
        self._over.set()
        self.wake.set()
        self.join(CLOSE_SECONDS)

    def _write(self) -> None:
        self._left += self._events.take()
        try:
            if self._folder.appends:
                self._folder.append_text(FILE, self._left)
            else:
                self._folder.write_text(FILE, self._text + self._left)
                self._text += self._left
            self._left = ""
        except StorageError as error:  # not fatal here: the run fails if its layers cannot be written either
            self._left = "\n" + self._left.lstrip()  # ends a partial line that may be in the file
            _logger.warning("events wait: %s", error)


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a result, as far as they are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _machine() -> str:
    """Return the kind of this machine, not its name."""
    return f"{platform.system()} {platform.machine()} with {os.cpu_count()} CPUs"


def read_events(folder: Folder) -> list[dict[str, Any]]:
    """Read all events in a folder, in order; empty if it has no such file. Lines that hold no event are passed over."""
    if not folder.is_file(FILE):
        return []
    events = (event_of(line) for line in whole_lines(_text(folder)).split("\n"))
    return [event for event in events if event]


def whole_lines(text: str) -> str:
    """Drop a last line without an end, as a killed process leaves it."""
    return text[: text.rfind("\n") + 1]


def _text(folder: Folder) -> str:
    """Return the text of a log; bytes that are no text are replaced, as their line is no event."""
    return folder.read_bytes(FILE).decode(errors="replace")
