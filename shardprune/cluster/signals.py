"""Graceful shutdown on SIGTERM."""

import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from shardprune.errors import Stopped

EXIT_CODE = 128 + signal.SIGTERM
TURN_SECONDS = 0.5

T = TypeVar("T")


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first SIGTERM into `Stopped`; ignore further ones during the shutdown."""
    told = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        if not told:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if told:  # whatever exception Ray or the command line's parser turned it into
        raise Stopped


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep the SIGTERM handler in the block and after it, even if a library sets its own.

    While Ray starts, its handler would end the process, yet a scheduler may send SIGTERM in those seconds as at any
    time. Calls that set a handler are ignored, as Ray itself does for SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before: Any = signal.getsignal(signal.SIGTERM)
    set_handler = signal.signal

    def set_others(number: int, handler: Any) -> Any:
        return before if number == signal.SIGTERM else set_handler(number, handler)

    signal.signal = set_others  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = set_handler
        signal.signal(signal.SIGTERM, before)  # Ray's C++ library sets one, too, after connecting


def as_completed(futures: Iterable["Future[T]"]) -> Iterator["Future[T]"]:
    """Yield futures as they complete, and let SIGTERM interrupt the wait for them.

    The kernel may give a signal to any thread, as it does when a suspended process is resumed. Python's handler runs
    in the main thread all the same, yet only once that is no longer in a wait without a limit, as of
    `concurrent.futures.as_completed`.
    """
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, TURN_SECONDS, FIRST_COMPLETED)
        yield from done
