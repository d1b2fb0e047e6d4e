"""Tensors that a file holds as several, one below the other, as some models have a convolution of queries, keys and
values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shardprune.storage.safetensors_file import Entry, StoredTensor


@dataclass(frozen=True)
class Joined:
    """The stored tensors, by name, of which a tensor is made, and how many rows (of the first dimension) each has."""

    names: tuple[str, ...]
    rows: tuple[int, ...]

    def entry(self, stored: Mapping[str, Entry]) -> "JoinedEntry":
        """Return where the tensor is, by the entries of the stored ones."""
        parts = tuple(stored[name] for name in self.names)
        own = {field.name: getattr(parts[0], field.name) for field in fields(Entry)}
        own["shape"] = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        return JoinedEntry(**own, parts=parts, names=self.names)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the stored tensors of which one of a shape is made."""
        assert sum(self.rows) == shape[0], "a joined tensor is written as a whole"
        return {name: (rows, *shape[1:]) for name, rows in zip(self.names, self.rows, strict=True)}

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return the stored tensor of a name, a view of the whole."""
        return tensor.split(list(self.rows))[self.names.index(name)]


@dataclass(frozen=True, kw_only=True)
class JoinedEntry(Entry):
    """The location of a tensor that is stored in `parts` with `names`. Its bytes are those of the first one."""

    parts: tuple[Entry, ...]
    names: tuple[str, ...]

    @property
    def files(self) -> set[str]:
        return {part.file for part in self.parts}


@dataclass(frozen=True)
class JoinedTensor(StoredTensor):
    """A tensor that is stored in several, its `pieces`; digests are those of the pieces."""

    pieces: tuple[StoredTensor, ...]

    def parts(self) -> tuple[StoredTensor, ...]:
        return self.pieces

    def joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    def read(self) -> Tensor:
        return self.joined([piece.read() for piece in self.pieces])

    def read_elements(self, start: int, stop: int) -> Tensor:
        found, first = [], 0
        for piece in self.pieces:
            elements = math.prod(piece.entry.shape)
            low, high = max(start - first, 0), min(stop - first, elements)
            if low < high:
                found.append(piece.read_elements(low, high))
            first += elements
        return torch.cat(found) if found else torch.empty(0, dtype=self.entry.dtype)

    def read_part(self, start: int, buffer: Tensor) -> None:
        width = self.entry.dtype.itemsize
        elements = self.read_elements(start // width, -(-(start + buffer.numel()) // width))
        buffer.copy_(elements.view(torch.uint8)[start % width :][: buffer.numel()])
