"""Which rows a process trains on in which step: decided by the seed alone, whoever works on them.

The rows of all epochs form one endless sequence, each epoch in an order of its own. A step takes the next `batch` of
them, cut into micro-batches; micro-batch number n of a step goes to process n modulo their number.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from shardprune.recipes.groups import rows_per_wave
from shardprune.recovery.rows import Rows


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together; `seed` is of whatever is random on their way."""

    rows: list[int]
    seed: int


class Batches:
    """The steps of a training over `rows`.

    Args:
        batch: rows of a step.
        micro: rows of a micro-batch, which divides it.
    """

    def __init__(self, rows: Rows, batch: int, micro: int, seed: int) -> None:
        self.rows, self.batch, self.micro, self.seed = rows, batch, micro, seed
        self._orders: dict[int, Tensor] = {}  # of the epochs that the last step reached

    def step(self, step: int) -> list[int]:
        """The rows of a step."""
        places = [divmod(place, len(self.rows)) for place in range(step * self.batch, (step + 1) * self.batch)]
        epochs = {epoch for epoch, _ in places}
        self._orders = {epoch: self._order(epoch) for epoch in epochs}
        return [int(self._orders[epoch][index]) for epoch, index in places]

    def targets(self, step: int) -> int:
        """The number of tokens whose predictions count in a step."""
        return self.rows.targets(self.step(step))

    def of(self, step: int, process: int, processes: int) -> Iterator[MicroBatch]:
        """The micro-batches of one process in a step."""
        rows = self.step(step)
        count = self.batch // self.micro
        for number in range(process, count, processes):
            chosen = rows[number * self.micro : (number + 1) * self.micro]
            yield MicroBatch(chosen, seed=self.seed + 1_000_003 * (step * count + number + 1))

    def _order(self, epoch: int) -> Tensor:
        return self._orders[epoch] if epoch in self._orders else self.rows.order(epoch, self.seed)


@dataclass(frozen=True)
class Processes:
    """`count` processes that share batches of `batch` rows, `micro` of them at a time in each."""

    count: int
    batch: int
    micro: int

    def shrunk_to(self, slots: int) -> "Processes":
        """The most processes among at most `slots` that share a batch evenly."""
        fitting = (n for n in range(min(slots, self.count), 0, -1) if self.batch % (n * self.micro) == 0)
        return Processes(next(fitting), self.batch, self.micro)


def micro_batch_of(batch: int, processes: int, length: int) -> int:
    """The most rows of `length` tokens, about 4096 tokens' worth, into which a process's part of a batch divides."""
    part = batch // processes
    return next(rows for rows in range(min(rows_per_wave(length), part), 0, -1) if part % rows == 0)
