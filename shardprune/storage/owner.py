"""The owner of an output directory: the one process that drives a run there, for as long as it does.

Its record in the directory says which process it is, and is written anew while the process lives. On its own machine
an owner counts as dead as soon as its process is gone; on another one after `SILENCE_SECONDS` without a new record, of
which the last `WATCHED_SECONDS` are watched: the clocks of two machines differ.
"""

import contextlib
import fcntl
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, ValidationError

from shardprune.errors import InputError, StorageError
from shardprune.storage.folder import Folder
from shardprune.storage.malformed import Malformed
from shardprune.storage.output_names import OWNER

RENEWAL_SECONDS = 15.0  # between two records
SILENCE_SECONDS = 55.0  # after which the owner on another machine counts as dead: three records, and slow storage
WATCHED_SECONDS = 2 * RENEWAL_SECONDS + 5.0  # of silence, whatever a record's time says
CLOCKS_APART = 3600.0  # seconds that no two clocks differ by: an older record is that of a dead process
LOOK_SECONDS = (
    1.0  # between two looks at a record that may be renewed; on remote storage until the last writer is known
)
BOOT = Path("/proc/sys/kernel/random/boot_id")


class OwnerRecord(BaseModel):
    """The content of `owner.json`: a process, by its machine (and that one's start), number and start, as `_start_of`
    has it; and the `time` of the record, in seconds since the epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    boot: str
    process: int
    started: float
    time: float

    @classmethod
    def of_this_process(cls) -> "OwnerRecord":
        process = os.getpid()
        return cls(host=platform.node(), boot=_boot(), process=process, started=_start_of(process), time=time.time())

    def is_of(self, other: "OwnerRecord") -> bool:
        """Return whether two records are of the same process."""
        return self.model_copy(update={"time": other.time}) == other

    def is_here(self) -> bool:
        """Return whether the process is one of this machine."""
        return (self.host, self.boot) == (platform.node(), _boot())

    def lives(self) -> bool:
        """Return whether the process, one of this machine, is still there."""
        try:
            process = psutil.Process(self.process)
            return _start_of(self.process) == self.started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def check_unowned(folder: Folder) -> None:
    """Check that no other process drives a run in a directory; wait where only its silence tells that it is dead.

    Raises:
        InputError: one does.
    """
    first: OwnerRecord | None = None
    while (owner := _read(folder)) is not None and not _is_ours(owner):
        if owner.is_here():
            if owner.lives():
                raise _in_use(folder, owner)
            return
        if first is None:
            first, silent = owner, max(0.0, time.time() - owner.time)  # clocks of machines differ
            watched = 0.0 if silent > CLOCKS_APART else max(WATCHED_SECONDS, SILENCE_SECONDS - silent)
            end = time.monotonic() + watched
        elif owner != first:
            raise _in_use(folder, owner)
        if time.monotonic() >= end:
            return
        time.sleep(LOOK_SECONDS)


@contextmanager
def owned(folder: Folder) -> Iterator["Ownership"]:
    """Own a directory while the block lasts. A directory that this process owns already stays owned after it.

    Raises:
        InputError: another process drives a run there.
    """
    with one_at_a_time(folder):
        check_unowned(folder)
        nested = _is_ours(_read(folder))
        if not nested:
            _write(folder)
    if not folder.local and not nested:  # the last one to write has it
        time.sleep(LOOK_SECONDS)
        check_unowned(folder)
    ownership = Ownership(folder)
    if nested:
        yield ownership
        return
    ownership.start()
    try:
        yield ownership
    finally:
        ownership.end()


class Ownership(threading.Thread):
    """A thread that renews the record of this process, and notices if it is not its own any more."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(daemon=True)
        self._folder, self._over = folder, threading.Event()

    def run(self) -> None:
        while not self._over.wait(RENEWAL_SECONDS):
            with contextlib.suppress(StorageError):  # the run ends by itself if its own files cannot be written
                if _is_ours(_read(self._folder)):
                    _write(self._folder)

    def check(self) -> None:
        """Check that this process still owns the directory.

        Raises:
            StorageError: another one does, or the directory was moved or removed.
        """
        if not _is_ours(_read(self._folder)):
            url = self._folder.url
            raise StorageError(
                self._folder.field, f"{url} is not this run's any more: it was moved, or another process has taken it"
            )

    def end(self) -> None:
        """Give the directory up."""
        self._over.set()
        self.join()
        with contextlib.suppress(StorageError):  # it has ended, which everybody on this machine sees
            if _is_ours(_read(self._folder)):
                self._folder.remove(OWNER)


def _is_ours(owner: OwnerRecord | None) -> bool:
    return owner is not None and owner.is_of(OwnerRecord.of_this_process())


def _write(folder: Folder) -> None:
    folder.write_json(OWNER, OwnerRecord.of_this_process().model_dump())


def _read(folder: Folder) -> OwnerRecord | None:
    """Return the record in a directory; None where there is none, or none that a process would have written."""
    if not folder.is_file(OWNER):
        return None
    try:
        return OwnerRecord.model_validate(folder.read_json(OWNER))
    except (Malformed, ValidationError):
        return None
    except StorageError:
        if folder.is_file(OWNER):
            raise
        return None  # it was removed between two looks


@contextmanager
def one_at_a_time(folder: Folder) -> Iterator[None]:
    """Let the processes of a machine look and write one after another, where the file system can lock a directory."""
    if not folder.local:
        yield
        return
    os.makedirs(folder.root, exist_ok=True)
    place = os.open(folder.root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def _in_use(folder: Folder, owner: OwnerRecord) -> InputError:
    place = f"process {owner.process} on {owner.host}"
    return InputError(folder.field, f"{folder.url} is in use by another run ({place}); wait for its end, or stop it")


def _start_of(process: int) -> float:
    """Return when a process of this machine started: in clock ticks since the machine did, which no step of its clock
    changes, or where there is no /proc, in seconds since the epoch.

    Raises:
        psutil.NoSuchProcess: it is gone.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return psutil.Process(process).create_time()
    return float(stat.rpartition(")")[2].split()[19])  # field 22; the second is a name in parentheses


def _boot() -> str:
    return BOOT.read_text().strip() if BOOT.exists() else ""
