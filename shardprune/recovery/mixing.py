"""Rows of several sources, mixed by their weights.

The rows of each source form an endless sequence, each pass over the source in an order of its own, and the mixture
takes from these sequences. A small source with a large weight comes several times while of others a part comes once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.recovery.row_images import joined_images
from shardprune.recovery.rows import Rows, permutation
from shardprune.storage.mixture import Part, order_of, shares_of


@dataclass(frozen=True)
class RowMixture:
    """The order of rows of several sources, which stand one source after the other.

    An epoch has as many rows as all sources together, from each as many as its weight says, spread evenly.

    Attributes:
        sizes: rows of each source.
        drawn: rows of an epoch that come from each source.
    """

    sizes: tuple[int, ...]
    drawn: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[Part], sizes: Sequence[int]) -> "RowMixture":
        """Share out an epoch by the weights of the sources.

        Raises:
            InputError: one would give no row.
        """
        weights: list[Fraction] = [part.weight for part in parts]
        drawn = shares_of(weights, sum(sizes))
        if none := [part.source for part, rows in zip(parts, drawn, strict=True) if not rows]:
            reason = f"{none[0]!r} would give none of the {sum(sizes)} rows of an epoch by the weights"
            raise InputError("data", f"{reason}; give it a larger one")
        return cls(tuple(sizes), tuple(drawn))

    def order(self, epoch: int, seed: int) -> Tensor:
        """Return the rows of an epoch in their order, int64 [rows], a function of epoch and seed alone."""
        taken = [self._taken(place, epoch, seed).tolist() for place in range(len(self.sizes))]
        return torch.tensor([taken[place][row] for place, row in order_of(self.drawn)])

    def passes(self) -> list[float]:
        """Return how often the rows of each source come in an epoch, on average."""
        return [drawn / size for drawn, size in zip(self.drawn, self.sizes, strict=True)]

    def _taken(self, place: int, epoch: int, seed: int) -> Tensor:
        """Return the rows of a source in an epoch, int64 [drawn]."""
        size, drawn = self.sizes[place], self.drawn[place]
        first = epoch * drawn
        passes = range(first // size, (first + drawn - 1) // size + 1)
        rows = torch.cat([permutation(size, f"source {place} pass {number} {seed}") for number in passes])
        start = first - passes[0] * size
        return rows[start : start + drawn] + sum(self.sizes[:place])


def joined(rows: Sequence[Rows]) -> Rows:
    """Return the rows of several sources as one, source after source."""
    offsets = torch.tensor([0, *(len(part.tokens) for part in rows)]).cumsum(0)
    starts = [part.starts[1:] + offset for part, offset in zip(rows, offsets[:-1], strict=True)]
    return Rows(
        torch.cat([part.tokens for part in rows]),
        torch.cat([part.learned for part in rows]),
        torch.cat([part.positions for part in rows]),
        torch.cat([torch.zeros(1, dtype=torch.int64), *starts]),
        joined_images([(part.images, len(part)) for part in rows]),
    )
