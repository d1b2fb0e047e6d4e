"""How a run ends that is told to: by a scheduler's SIGTERM, it closes its workers and says so."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from shardprune.errors import Stopped

EXIT_CODE = 128 + signal.SIGTERM


@contextmanager
def stoppable() -> Iterator[None]:
    """Turn the first SIGTERM into `Stopped`, and pass over those that come while the run closes down."""
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
    if told:  # whatever Ray and the parser of the command line made of it
        raise Stopped


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep what SIGTERM does, in the block and after it, where a library would change it.

    Ray gives SIGTERM a handler that ends the process while it starts, seconds in which a run is told to stop as at any
    other time. Calls that would set one are passed over, which is what Ray itself does for SIGINT.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread has a say
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
        signal.signal(signal.SIGTERM, before)  # Ray's own library sets one, too, when it has connected
