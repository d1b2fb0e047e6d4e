"""Processes by pid and start time, so that none is signalled whose pid belongs to another by now."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Identity = Sequence[Any]  # pid, and start time or None


def start_time(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None where it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def identity(pid: int) -> Identity:
    return [pid, start_time(pid)]


def alive(who: Identity) -> bool:
    return who[1] is not None and start_time(who[0]) == who[1]


def stop(who: Identity, first: signal.Signals = signal.SIGTERM, grace: float = 3.0) -> None:
    for number, seconds in ((first, grace), (signal.SIGKILL, 2.0)):
        if not alive(who):
            return
        os.kill(who[0], number)
        end = time.monotonic() + seconds
        while alive(who) and time.monotonic() < end:
            time.sleep(0.02)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
