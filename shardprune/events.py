"""What happens in a run, one line of JSON each in its output's `events.jsonl`: for `shardprune status` and reports.

Every line has `time` (seconds since the epoch) and `event`:

    run       an attempt starts: command, layers, finished (layers that are), workers
    begin     a phase starts: phase
    end       it ends: phase, seconds
    progress  how far a step is, at least every few seconds: label, detail, done, total
    layer     a layer is finished: layer, shard, seconds, bytes (of its file), error, sparsity
    iteration one of `mop` is finished: iteration, step, removed, share (of what was asked for)
    work      what one worker did since the last time: shard, replica, spans (see `shard.ledger.Span`)
    lost      workers were lost: reason
    done, stopped, failed: the attempt ends so; failed with error
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from shardprune.errors import StorageError, first_line, without_credentials
from shardprune.stopping import Stopped
from shardprune.storage import Folder

FILE = "events.jsonl"
HEARTBEAT_SECONDS = 15.0  # between two signs of life of a run that is at work
REWRITE_SECONDS = 10.0  # between two writings of the file where nothing can be appended to one


class Events:
    """The events of a run. What happens before it has an output is kept until it has one."""

    def __init__(self) -> None:
        self.position: Callable[[], dict[str, Any] | None] = lambda: None  # of the step under way
        self._waiting: list[str] = []
        self._file: _File | None = None
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        """Something has happened. Threads may say so at the same time."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n"
        with self._lock:
            self._waiting.append(line)
            if self._file and self._file.due():
                self._flush()

    @contextmanager
    def recorded(self, folder: Folder, **facts: Any) -> Iterator[None]:
        """Write what happens while the block lasts into a folder, beside what earlier attempts have left there.

        Inside another block of the same kind this one has no file of its own.

        Args:
            facts: of the event `run`.
        """
        if self._file:
            yield
            return
        self._file = _File(folder)
        over = threading.Event()
        heart = threading.Thread(target=self._beat, args=(over,), daemon=True)
        heart.start()
        try:
            self.emit("run", **facts)
            yield
            self.emit("done")
        except BaseException as error:
            with suppress(StorageError):  # the error itself says more
                self._close(error)
            raise
        else:
            self._close(None)
        finally:
            over.set()
            heart.join()
            self._file = None

    def _close(self, error: BaseException | None) -> None:
        """Write the rest, and how the attempt has ended."""
        if isinstance(error, Stopped | KeyboardInterrupt):
            self.emit("stopped")
        elif error:
            self.emit("failed", error=without_credentials(f"{type(error).__name__}: {first_line(error)}"))
        with self._lock:
            self._flush()

    def _beat(self, over: threading.Event) -> None:
        """Say now and then that the run is alive."""
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(StorageError):  # the run's own writes find out
                self.emit("progress", **(self.position() or {}))

    def _flush(self) -> None:
        assert self._file is not None
        self._file.write("".join(self._waiting))
        self._waiting.clear()


class _File:
    """The file, appended to where that is possible, else written anew."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._written = time.monotonic() - REWRITE_SECONDS
        self._text = _whole_lines(folder.read_text(FILE)) if folder.is_file(FILE) else ""
        if folder.appends and self._text:  # without what a killed driver left of a line
            folder.write_text(FILE, self._text)

    def due(self) -> bool:
        return self._folder.appends or time.monotonic() - self._written >= REWRITE_SECONDS

    def write(self, text: str) -> None:
        if self._folder.appends:
            self._folder.append_text(FILE, text)
        else:
            self._folder.write_text(FILE, self._text + text)
            self._text += text
            self._written = time.monotonic()


def read_events(folder: Folder) -> list[dict[str, Any]]:
    """All events that a folder holds, in their order; none where it has no file of them."""
    if not folder.is_file(FILE):
        return []
    return [json.loads(line) for line in _whole_lines(folder.read_text(FILE)).splitlines()]


def _whole_lines(text: str) -> str:
    """A text without an unfinished last line."""
    return text[: text.rfind("\n") + 1]
