"""How many processes share a training's batches."""

from dataclasses import dataclass

from shardprune.setting_groups import WAVE_TOKENS


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
    most = max(1, WAVE_TOKENS // length)
    return next(rows for rows in range(min(most, part), 0, -1) if part % rows == 0)
