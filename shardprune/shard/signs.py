"""Signs of life of a worker's process: what it is doing, for how long, and whether it gets on with it.

A thread of its own gives them, so that a process which is stopped, swaps or holds its interpreter in a lock gives none,
and one whose call has come to a standstill says so.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import psutil

# A process gets on if it uses this share of a core, or reads and writes so many bytes a second.
BUSY_SHARE = 0.05
BUSY_BYTES = 2**16
# Modules in which a process waits for another one; the last is the lock of a compilation that another one has begun.
EXCHANGES = ("shardprune.shard.peers", "torch.distributed", "deepspeed.comm", "torch.utils.file_baton")
# And those that wait for the handle of a collective: code in C++ has no frame, so they are the innermost ones then.
HOLDERS = ("deepspeed.runtime",)
OWN = "shardprune"


@dataclass(frozen=True)
class Sign:
    """A sign of life.

    Attributes:
        number: counts the signs of a process.
        doing: the call under way, such as `layer 3, solve`; None where there is none.
        seconds: of that call so far.
        idle: its last seconds, in which neither the process nor a child of it has used the processor, nor it files.
        waits: whether it waits for another worker.
        place: the line of shardprune that it is at.
        longest: seconds of the longest call that is over.
    """

    number: int
    host: str
    node: str
    pid: int
    doing: str | None
    seconds: float
    idle: float
    waits: bool
    place: str
    longest: float


@dataclass(frozen=True)
class Call:
    """A call under way in a thread, since `started` on the clock of this process."""

    doing: str
    thread: int
    started: float


class Calls:
    """The calls of a process, one at a time."""

    def __init__(self) -> None:
        self.current: Call | None = None
        self.longest = 0.0

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Note a call; one inside another is part of that."""
        if self.current is not None:
            yield
            return
        self.current = Call(doing, threading.get_ident(), time.monotonic())
        try:
            yield
        finally:
            self.longest = max(self.longest, time.monotonic() - self.current.started)
            self.current = None


class Signs(threading.Thread):
    """A thread that sends a sign of life of this process every so many seconds, until the process ends.

    Args:
        node: the name of the machine for whoever reads the signs.
    """

    def __init__(self, calls: Calls, send: Callable[[Sign], None], seconds: float, node: str) -> None:
        super().__init__(daemon=True, name="signs")
        self._calls, self._send, self._seconds, self._node = calls, send, seconds, node
        self._over = threading.Event()
        self._number = 0
        self._process = psutil.Process()  # kept: to make one reads the whole machine's counters
        self._looked = 0  # bytes that looking for children has read
        self._at, self._used = time.monotonic(), self._use()
        self._busy_at = self._at

    def run(self) -> None:
        while True:
            sign = self.sign()
            with suppress(Exception):  # the cluster's head may be away for a while: the next one says the same
                self._send(sign)
            if self._over.wait(self._seconds):
                return

    def stop(self) -> None:
        self._over.set()

    def sign(self) -> Sign:
        """Return the next sign."""
        now, used = time.monotonic(), self._use()
        elapsed = now - self._at
        own, compilers, files = (after - before for before, after in zip(self._used, used, strict=True))
        if max(own, compilers) >= BUSY_SHARE * elapsed or files >= BUSY_BYTES * elapsed:
            self._busy_at = now
        self._at, self._used = now, used
        self._number += 1
        call = self._calls.current
        frames = _frames(sys._current_frames().get(call.thread)) if call else []
        return Sign(
            number=self._number,
            host=socket.gethostname(),
            node=self._node,
            pid=os.getpid(),
            doing=call.doing if call else None,
            seconds=now - call.started if call else 0.0,
            idle=now - max(call.started, self._busy_at) if call else 0.0,
            waits=_waits(frames),
            place=_place(frames),
            longest=self._calls.longest,
        )

    def _use(self) -> tuple[float, float, int]:
        """Return the seconds of processor time of this process, those of its children that run, and its files' bytes.

        A clock of nanoseconds, less what this thread takes: the system's ticks of 10 ms are too coarse to tell 5 % of
        a short time. Children are compilers, of DeepSpeed's operations or of a kernel, for which a call waits.
        """
        own = time.process_time() - (time.thread_time() if threading.current_thread() is self else 0.0)
        files, children, looked = self._files(), 0.0, self._looked
        for child in self._process.children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                times = child.cpu_times()
                children += times.user + times.system
        self._looked += self._files() - files
        return own, children, files - looked

    def _files(self) -> int:
        """Return the bytes that this process has read and written, 0 on a system that doesn't count them."""
        with suppress(AttributeError, OSError, psutil.Error):
            counted = self._process.io_counters()
            return sum(getattr(counted, name, 0) for name in ("read_chars", "write_chars", "read_bytes", "write_bytes"))
        return 0


def _frames(innermost: FrameType | None) -> list[FrameType]:
    found = []
    while innermost:
        found.append(innermost)
        innermost = innermost.f_back
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _waits(frames: list[FrameType]) -> bool:
    """Return whether a call with these frames, innermost first, waits for another process if it does nothing."""
    return any(_module(frame).startswith(EXCHANGES) for frame in frames) or any(
        _module(frame).startswith(HOLDERS) for frame in frames[:1]
    )


def _place(frames: list[FrameType]) -> str:
    """Return the innermost line of shardprune, or of what else is running."""
    own = [frame for frame in frames if _module(frame).partition(".")[0] == OWN and _module(frame) != __name__]
    for frame in (own or frames)[:1]:
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
    return ""
