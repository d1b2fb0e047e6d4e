"""Workers that hang: which of them has given no sign of life, or has come to a standstill, for longer than a run waits.

A stopped, swapping or deadlocked process does not die, and those that wait for what it has to send do not either. Every
worker gives signs of life (`shard.signs`) beside its calls; a driver that waits looks at them.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shardprune.errors import WorkerLost
from shardprune.shard.signs import Sign
from shardprune.storage.quantities import duration

MOST_SECONDS = 10.0  # between two signs
START_SECONDS = 300.0  # for the first sign, which comes after imports, at least
SIGNS = 4  # that a worker gives at least in the time after which it is lost
# How many times longer a call may last while it uses the processor: it works, or spins without getting anywhere.
WORKING = 6
# And one in which all wait for one another: whoever keeps them waiting must have been noticed before.
WAITING = 2


def sign_seconds(patience: float) -> float:
    """Return the seconds between two signs of a worker."""
    return min(MOST_SECONDS, patience / SIGNS)


@dataclass
class _Heard:
    """What a driver has heard of a worker: its last sign, and for how long there was no newer one."""

    sign: Sign | None = None
    silent: float = 0.0


class Patience:
    """The patience of a run with its workers.

    Args:
        workers: their names in messages.
        seconds: of silence or standstill after which a worker is lost, beyond the longest call of any so far.
        read: returns the last sign of the worker at an index; None before its first.
        training: whether workers are the processes of a training: one call as long as that, after a start that others
            watch over.
    """

    def __init__(
        self,
        workers: Sequence[str],
        seconds: float,
        read: Callable[[int], Sign | None],
        training: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workers, self._seconds, self._read, self._training = workers, seconds, read, training
        self._clock = clock
        self._heard = [_Heard() for _ in workers]
        self._looked = clock()
        self.hanging: list[Sign] = []  # of those that are lost
        self._lock = threading.Lock()  # several threads of a driver wait for the same workers

    @property
    def between_looks(self) -> float:
        """Seconds between two looks."""
        return sign_seconds(self._seconds)

    def signs(self) -> list[Sign]:
        """Return the last sign of every worker that has given any."""
        return [heard.sign for heard in self._heard if heard.sign]

    def look(self) -> None:
        """Look at the signs of all workers, at most once in `between_looks`.

        Raises:
            WorkerLost: a worker hangs.
        """
        with self._lock:
            now = self._clock()
            elapsed = now - self._looked
            if elapsed < self.between_looks:
                return
            self._looked = now
            # A driver that was away itself, stopped or busy, has not heard what there was to hear.
            self._listen(min(elapsed, 2 * self.between_looks))
            if lost := self._lost():
                raise WorkerLost(lost)

    def _listen(self, elapsed: float) -> None:
        for index, heard in enumerate(self._heard):
            sign = self._read(index)
            if sign is None and self._training:
                continue
            if sign is None or (heard.sign and sign.number == heard.sign.number and sign.pid == heard.sign.pid):
                heard.silent += elapsed
            else:
                heard.sign, heard.silent = sign, 0.0

    def _lost(self) -> str | None:
        """Return what is to be said of a worker that hangs: of one that is silent first, as others wait for it."""
        limit = self._seconds + max((sign.longest for sign in self.signs()), default=0.0)
        first = max(limit, START_SECONDS)
        silent = [index for index, heard in enumerate(self._heard) if heard.silent > (limit if heard.sign else first)]
        if silent:
            self.hanging = [sign for index in silent if (sign := self._heard[index].sign)]
            return self._silence(max(silent, key=lambda index: self._heard[index].silent))
        heard = [(index, heard.sign) for index, heard in enumerate(self._heard) if heard.sign and heard.sign.doing]
        for index, sign in heard:
            endless = sign.seconds > WORKING * limit and not self._training
            if not sign.waits and (sign.idle > limit or endless):
                self.hanging = [sign]
                return self._standstill(index, sign)
        heard_of_all = all(heard.silent <= 2 * self.between_looks for heard in self._heard)
        for index, sign in heard:
            if sign.idle > WAITING * limit and heard_of_all and all(other.waits for _, other in heard):
                self.hanging = [sign]
                return f"{self._standstill(index, sign)}, waiting for another worker, of which none is at work"
        return None

    def _silence(self, index: int) -> str:
        heard = self._heard[index]
        since = f"has given no sign of life for {duration(heard.silent)}"
        if heard.sign is None:
            return f"{self._workers[index]} {since}, since its process was asked for"
        doing = f"its last was from {heard.sign.doing}" if heard.sign.doing else "it had nothing to do then"
        return f"{self._name(index, heard.sign)} {since}; {doing}"

    def _standstill(self, index: int, sign: Sign) -> str:
        place = f" ({sign.place})" if sign.place else ""
        still = f", {duration(sign.idle)} of them without any use of the processor" if sign.idle else ""
        return f"{self._name(index, sign)} has been at {sign.doing}{place} for {duration(sign.seconds)}{still}"

    def _name(self, index: int, sign: Sign) -> str:
        return f"{self._workers[index]} (process {sign.pid} on {sign.host})"
