"""The rows of each process in each step. They depend on the seed alone, not on the processes.

The rows of all epochs form one endless sequence, each epoch in an order of its own. A step takes the next `batch` of
them, cut into micro-batches; micro-batch n of a step goes to process n modulo the number of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from shardprune.recipes.groups import wave_of
from shardprune.recovery.mixing import RowMixture
from shardprune.recovery.rows import Rows


@dataclass(frozen=True)
class MicroBatch:
    """Rows that pass through the model together, and the seed of their dropout."""

    rows: list[int]
    seed: int


class Batches:
    """The batches of a training run over `rows`.

    Args:
        batch: rows of a step.
        micro: rows of a micro-batch, a divisor of `batch`.
        mixture: of the rows, if they come from several sources.
    """

    def __init__(self, rows: Rows, batch: int, micro: int, seed: int, mixture: RowMixture | None = None) -> None:
        self._order = mixture.order if mixture else rows.order
        self.rows, self.batch, self.micro, self.seed = rows, batch, micro, seed
        self._orders: dict[int, Tensor] = {}  # by epoch, of the last step's epochs

    def step(self, step: int) -> list[int]:
        """Return the rows of a step."""
        places = [divmod(place, len(self.rows)) for place in range(step * self.batch, (step + 1) * self.batch)]
        known = self._orders  # which another thread may replace
        orders = {
            epoch: known[epoch] if epoch in known else self._order(epoch, self.seed)
            for epoch in {epoch for epoch, _ in places}
        }
        self._orders = orders
        return [int(orders[epoch][index]) for epoch, index in places]

    def used(self, steps: int) -> list[int]:
        """Return the rows of the first `steps` steps, each once, ascending."""
        found: set[int] = set()
        for step in range(steps):
            found.update(self.step(step))
            if len(found) == len(self.rows):
                break
        return sorted(found)

    def targets(self, step: int) -> int:
        """Return the number of tokens in a step whose predictions enter the loss."""
        return self.rows.targets(self.step(step))

    def tokens(self, step: int) -> int:
        """Return the number of tokens in a step, padding not included."""
        return self.rows.size(self.step(step))

    def of(self, step: int, process: int, processes: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches of one process in a step."""
        rows = self.step(step)
        count = self.batch // self.micro
        for number in range(process, count, processes):
            chosen = rows[number * self.micro : (number + 1) * self.micro]
            # A large prime as stride, so that runs with neighbouring seeds share no micro-batch's random numbers.
            yield MicroBatch(chosen, seed=self.seed + 1_000_003 * (step * count + number + 1))


@dataclass(frozen=True)
class Processes:
    """`count` processes that share batches of `batch` rows, `micro` at a time in each."""

    count: int
    batch: int
    micro: int

    def shrunk_to(self, slots: int) -> "Processes":
        """Return the largest number of processes up to `slots` that share a batch evenly."""
        fitting = (n for n in range(min(slots, self.count), 0, -1) if self.batch % (n * self.micro) == 0)
        return Processes(next(fitting), self.batch, self.micro)


def micro_batch_of(batch: int, processes: int, length: int) -> int:
    """Return the largest micro-batch that divides a process's part of a batch, at most a wave's worth of tokens."""
    part = batch // processes
    return next(rows for rows in range(min(wave_of(None, length), part), 0, -1) if part % rows == 0)
