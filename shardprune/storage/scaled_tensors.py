"""Tensors that are stored in eight bits, with scales by which blocks of them are multiplied, and read in a wider dtype.

Block [i, j] of a weight [rows, cols] is multiplied with element [i, j] of its scales. Blocks at the end of rows and
columns may be cut off. The product is taken in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shardprune.storage.folder import Folder
from shardprune.storage.joined_tensors import JoinedEntry, JoinedTensor
from shardprune.storage.safetensors_file import Entry, StoredTensor, read_elements, read_tensor

BAND = 2**22  # elements that are multiplied at a time: what is in float32 stays small
BIAS = 127  # of exponents that are stored in eight bits


def dequantised(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype, first: int = 0) -> Tensor:
    """Return rows [rows, cols] of a weight multiplied with the scales of its blocks, in a dtype.

    Args:
        scales: of the whole weight, one for each block, in rows of blocks; of uint8, they are exponents of two.
        block: rows and columns of a block.
        first: number of the first of these rows in the weight.
    """
    rows, cols = weight.shape
    high, wide = block
    factors = (scales.float() - BIAS).exp2() if scales.dtype == torch.uint8 else scales.float()
    factors = factors.reshape(-1, -(-cols // wide))
    result = torch.empty(rows, cols, dtype=dtype, device=weight.device)
    step = max(1, BAND // max(1, cols))
    for start in range(0, rows, step):
        band = weight[start : start + step].float()
        places = torch.arange(first + start, first + start + len(band), device=weight.device) // high
        result[start : start + step] = band * factors[places].repeat_interleave(wide, 1)[:, :cols]
    return result


@dataclass(frozen=True, kw_only=True)
class ScaledEntry(Entry):
    """The location of a weight that is stored with scales. Its `dtype` is the one in which it is read, its bytes are
    those of the `weight` as it is stored.

    Attributes:
        scales: where the scales are, whose name is `scales_name`.
        block: rows and columns that have one scale.
    """

    weight: Entry
    scales: Entry
    scales_name: str
    block: tuple[int, int]

    @classmethod
    def of(
        cls, weight: Entry, dtype: torch.dtype, scales: Entry, scales_name: str, block: tuple[int, int]
    ) -> "ScaledEntry":
        """Return the location of a weight that is read in a dtype."""
        own = {field.name: getattr(weight, field.name) for field in fields(Entry)} | {"dtype": dtype}
        return cls(**own, weight=weight, scales=scales, scales_name=scales_name, block=block)

    @property
    def files(self) -> set[str]:
        return {self.weight.file, self.scales.file}


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A weight that is stored with scales, and read as their product; digests are those of the two as stored."""

    entry: ScaledEntry
    weight: StoredTensor
    scales: StoredTensor

    def parts(self) -> tuple[StoredTensor, ...]:
        return self.weight, self.scales

    def joined(self, parts: list[Tensor]) -> Tensor:
        weight, scales = parts
        return dequantised(weight, scales, self.entry.block, self.entry.dtype)

    def read(self) -> Tensor:
        return self.joined([part.read() for part in self.parts()])

    def read_elements(self, start: int, stop: int) -> Tensor:
        entry, (_, cols) = self.entry, self.entry.shape
        first = start // max(1, cols)
        last = -(-stop // max(1, cols))
        stored = read_elements(self.folder, entry.weight, first * cols, last * cols).reshape(-1, cols)
        scales = read_tensor(self.folder, entry.scales)
        rows = dequantised(stored, scales, entry.block, entry.dtype, first)
        return rows.reshape(-1)[start - first * cols : stop - first * cols].clone()

    def read_part(self, start: int, buffer: Tensor) -> None:
        width = self.entry.dtype.itemsize
        elements = self.read_elements(start // width, -(-(start + buffer.numel()) // width))
        buffer.copy_(elements.view(torch.uint8)[start % width :][: buffer.numel()])


def stored_tensor(folder: Folder, entry: Entry) -> StoredTensor:
    """Return a tensor in a file by its location."""
    return opened(folder, entry, lambda part, _: StoredTensor(folder, part), "")


def opened(folder: Folder, entry: Entry, plain: Callable[[Entry, str], StoredTensor], name: str) -> StoredTensor:
    """Return a tensor of a name in a file by its location.

    Args:
        plain: returns a tensor that is stored as it is read, by its location and its name.
    """
    if isinstance(entry, JoinedEntry):
        return JoinedTensor(folder, entry, tuple(map(plain, entry.parts, entry.names)))
    if not isinstance(entry, ScaledEntry):
        return plain(entry, name)
    return ScaledTensor(folder, entry, plain(entry.weight, name), plain(entry.scales, entry.scales_name))
