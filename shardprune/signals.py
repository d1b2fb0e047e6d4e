"""Signals that stop a process: Ctrl-C (SIGINT), SIGTERM of a scheduler, SIGHUP of a terminal that is gone.

The first one raises `Stopped` in the main thread; what is open closes. A second Ctrl-C ends the process at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from shardprune.errors import Stopped

if TYPE_CHECKING:
    from concurrent.futures import Future

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
SAME_SECONDS = 1.0  # in which a second SIGINT is the first one, which a wrapper such as make passes on as well
TURN_SECONDS = 0.5
AGAIN_SECONDS = 0.1

T = TypeVar("T")


class _Signals:
    """The signal that this process was stopped by, and what must end with it."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.first_at = 0.0
        self.groups: set[int] = set()
        self.others_lost = sys.unraisablehook

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if self.first is None:
            self.first, self.first_at = signal.Signals(number), now
            raise Stopped(number)
        if number == signal.SIGINT and now - self.first_at > SAME_SECONDS:
            end_at_once(self.first)

    def receive_again(self, lost: "sys.UnraisableHookArgs") -> None:
        """Handle an exception where none can be raised, as in a finalizer or while a library in C is imported: the
        signal behind it comes again a little later."""
        if self.first is None or not isinstance(lost.exc_value, Stopped):
            self.others_lost(lost)
            return
        number, self.first = self.first, None
        timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


_signals = _Signals()


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first signal into `Stopped`; ignore further ones during the shutdown, except for Ctrl-C.

    A signal that this process was started to ignore, as `nohup` does with SIGHUP, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    _signals.first = None
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in NAMES}
    _signals.others_lost, sys.unraisablehook = sys.unraisablehook, _signals.receive_again
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _signals.receive)
    try:
        yield
    except BaseException:
        if _signals.first is None:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = _signals.others_lost
        first, _signals.first = _signals.first, None
    if first is not None:  # whatever exception Ray or another library turned it into
        raise Stopped(first)


def stopping() -> bool:
    """Return whether a signal has stopped this process, which is closing down."""
    return _signals.first is not None


def end_at_once(number: int, _frame: FrameType | None = None) -> None:
    """End the process without closing anything. Processes of Ray that it started end with it."""
    for group in _signals.groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(128 + number)


def quick_to_end() -> None:
    """Let signals end the process at once from now on: only the interpreter has to shut down."""
    for number in NAMES:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_at_once)


@contextmanager
def ending_with_this(group: int) -> Iterator[None]:
    """Kill a process group when the block ends, however it does, and where this process ends at once."""
    _signals.groups.add(group)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        _signals.groups.discard(group)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep the handlers of these signals in the block and after it, even if a library sets its own.

    While Ray starts, its handler would end the process, yet a scheduler may send SIGTERM in those seconds as at any
    time. Calls that set a handler are ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in NAMES}
    set_handler = signal.signal

    def set_others(number: int, handler: Any) -> Any:
        return before[number] if number in before else set_handler(number, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        for number, handler in before.items():
            signal.signal(number, handler)  # Ray's C++ library sets some, too, after connecting


def as_completed(futures: Iterable["Future[T]"]) -> Iterator["Future[T]"]:
    """Yield futures as they complete, and let signals interrupt the wait for them.

    The kernel may give a signal to any thread, as it does when a suspended process is resumed. Python's handler runs
    in the main thread all the same, yet only once that is no longer in a wait without a limit, as of
    `concurrent.futures.as_completed`.
    """
    from concurrent.futures import FIRST_COMPLETED, wait

    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, TURN_SECONDS, FIRST_COMPLETED)
        yield from done
