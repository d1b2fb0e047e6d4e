"""Tensors that a file holds as parts of a larger one, as some models have all experts of a layer in one tensor.

A stack is [experts, rows, cols]; each expert's matrix is made of parts [rows, cols], such as its gate and its up
projection: one below the other, or row by row in turn; the matrix may be transposed, [cols, rows].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardprune.storage.joined_tensors import Joined
from shardprune.storage.safetensors_file import Entry


@dataclass(frozen=True)
class Layout:
    """The parts of an expert's matrix: `transposed`, it is [cols, rows]; `interleaved`, their rows alternate."""

    transposed: bool
    interleaved: bool

    def parts(self, matrix: Tensor, count: int) -> list[Tensor]:
        """Return the `count` parts [rows, cols] of a matrix, views of it."""
        weight = matrix.t() if self.transposed else matrix
        if self.interleaved:
            return [weight[place::count] for place in range(count)]
        return list(weight.chunk(count))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Return the matrix that has these parts."""
        weight = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
        return weight.t() if self.transposed else weight


@dataclass(frozen=True)
class Slice:
    """The part number `place` of `count` of one expert's matrix in a stack of a `shape`."""

    shape: tuple[int, ...]
    expert: int
    place: int
    count: int
    layout: Layout

    def of(self, matrix: Tensor) -> Tensor:
        """Return the part of the expert's matrix, a view."""
        return self.layout.parts(matrix, self.count)[self.place]


@dataclass(frozen=True)
class Place:
    """The place of a tensor in the files: a stored tensor's `name`, and the `slice` of it where it is not the whole.
    Where several stored tensors are `joined` to it, the name is that of the first one."""

    name: str
    slice: Slice | None = None
    joined: Joined | None = None

    def __str__(self) -> str:
        if self.slice is None:
            return self.name
        return f"{self.name}[{self.slice.expert}] part {self.slice.place} of {self.slice.count}"

    @property
    def names(self) -> tuple[str, ...]:
        """The stored tensors that hold it, wholly or in part."""
        return self.joined.names if self.joined else (self.name,)

    def entry(self, stored: Mapping[str, Entry]) -> Entry:
        """Return where the tensor is, by the entries of the stored ones."""
        if self.joined is not None:
            return self.joined.entry(stored)
        whole, own = stored[self.name], self.slice
        if own is None:
            return whole
        size = whole.size // own.shape[0]  # of one expert's matrix
        start = whole.start + own.expert * size
        part = own.of(torch.empty(own.shape[1:], device="meta"))
        offset = int(part.storage_offset()) * whole.dtype.itemsize
        if part.is_contiguous():
            start, size = start + offset, part.numel() * whole.dtype.itemsize
            return replace(whole, shape=tuple(part.shape), start=start, end=start + size)
        # Its elements lie between others: all bytes of the matrix from its first one on are read for them.
        return replace(
            whole, shape=tuple(part.shape), start=start + offset, end=start + size, strides=tuple(part.stride())
        )


def stack_matrices(
    slices: Mapping[str, Slice], dtype: torch.dtype, tensor: Callable[[str], Tensor]
) -> Iterator[Tensor]:
    """Yield the matrices of a stack, one expert after the other.

    Args:
        slices: all parts of the stack by name.
        tensor: returns the part of a name.
    """
    experts: dict[int, list[str]] = {}
    for name, own in slices.items():
        experts.setdefault(own.expert, []).append(name)
    (shape,) = {own.shape for own in slices.values()}
    assert sorted(experts) == list(range(shape[0])), "a stack is written as a whole"
    for expert in range(shape[0]):
        matrix = torch.empty(shape[1:], dtype=dtype)
        for name in experts[expert]:
            slices[name].of(matrix).copy_(tensor(name))
        yield matrix
