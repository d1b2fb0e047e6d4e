"""What happens in a run, one line of JSON each in its output's `events.jsonl`: for `shardprune status` and reports.

Every line has `time` (seconds since the epoch) and `event`:

    run       the command starts: command, fingerprint, layers
    attempt   workers are about to start: finished (the layers that are), shards, replicas
    begin     a phase starts: phase
    end       it ends: phase, seconds
    progress  how far a step is, at least every few seconds: label, detail, done, total
    layer     a layer is finished: layer, shard, seconds, bytes (of its file), error, sparsity
    iteration one of `mop` is finished: iteration, step, removed, share (of what was asked for)
    work      what one worker did since the last time: shard, replica, spans (see `shard.ledger.Span`)
    lost      workers were lost: reason
    done, stopped, failed: the command ends so; failed with error

They are written by a thread of their own, so that nothing waits for them: what they are about is recorded elsewhere.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shardprune.errors import Stopped, StorageError, first_line, without_credentials
from shardprune.storage.folder import Folder
from shardprune.storage.output_names import EVENTS as FILE

HEARTBEAT_SECONDS = 15.0  # between two signs of life of a run that is at work
REWRITE_SECONDS = 10.0  # between two writings of the file where nothing can be appended to one
CLOSE_SECONDS = 10.0  # for the last events to be written; storage may be away

_logger = logging.getLogger(__name__)


class Events:
    """The events of a run. What happens before it has an output is kept until it has one."""

    def __init__(self) -> None:
        self.position: Callable[[], dict[str, Any] | None] = lambda: None  # of the step under way
        self.recorded_any = False  # whether a run has done anything; of one that was finished already nothing is
        self._waiting: list[str] = []
        self._writer: _Writer | None = None
        self._lock = threading.Lock()

    def emit(self, event: str, **fields: Any) -> None:
        """Something has happened. Threads may say so at the same time."""
        with self._lock:
            self._waiting.append(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")
        if self._writer:
            self._writer.wake.set()

    def take(self) -> str:
        """The lines that have come since the last time."""
        with self._lock:
            lines, self._waiting = self._waiting, []
        return "".join(lines)

    @contextmanager
    def recorded(self, folder: Folder, **facts: Any) -> Iterator[None]:
        """Write what happens while the block lasts into a folder, beside what earlier attempts have left there.

        Inside another block of the same kind this one has no file of its own.

        Args:
            facts: of the event `run`.
        """
        if self._writer:
            yield
            return
        self.recorded_any = True
        self._writer = _Writer(self, folder)
        self._writer.start()
        try:
            self.emit("run", **facts)
            yield
            self.emit("done")
        except (Stopped, KeyboardInterrupt):
            self.emit("stopped")
            raise
        except BaseException as error:
            self.emit("failed", error=without_credentials(f"{type(error).__name__}: {first_line(error)}"))
            raise
        finally:
            writer, self._writer = self._writer, None
            writer.close()


class _Writer(threading.Thread):
    """Writes what comes, and says now and then that the run is alive.

    The file is appended to where that is possible, else written anew, but not all the time.
    """

    def __init__(self, events: Events, folder: Folder) -> None:
        super().__init__(daemon=True)
        self.wake = threading.Event()
        self._events, self._folder = events, folder
        self._over = threading.Event()
        self._text = whole_lines(folder.read_text(FILE)) if folder.is_file(FILE) else ""
        if folder.appends and self._text:  # without what a killed driver left of a line
            folder.write_text(FILE, self._text)
        self._left = ""  # could not be written yet

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
        """Write the rest."""
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
        except StorageError as error:  # which ends the run if what matters cannot be written either
            self._left = "\n" + self._left.lstrip()  # ends what may stand there of a line
            _logger.warning("events wait: %s", error)


def read_events(folder: Folder) -> list[dict[str, Any]]:
    """All events that a folder holds, in their order; none where it has no file of them."""
    if not folder.is_file(FILE):
        return []
    events = (_parsed(line) for line in whole_lines(folder.read_text(FILE)).splitlines())
    return [event for event in events if event]


def _parsed(line: str) -> dict[str, Any] | None:
    """The event of a line; None where a write that failed has left a part of one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and {"time", "event"} <= event.keys() else None


def whole_lines(text: str) -> str:
    """Drop a last line that has no end, as a killed process leaves it."""
    return text[: text.rfind("\n") + 1]
