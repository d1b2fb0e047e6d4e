"""Sparse tensors as a mask and their nonzero values, to the bit.

The mask has one bit an element in C order, the lowest bit of a byte first; the bits behind the last element are 0. An
element counts as zero where all of its bits are: a negative zero is a value, so that nothing is lost.
"""

import numpy as np
import torch
from torch import Tensor

from shardprune.storage.malformed import Malformed

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def mask_bytes(elements: int) -> int:
    """Return the bytes of the mask of so many elements."""
    return -(-elements // 8)


def pays(elements: int, nonzero: int, itemsize: int) -> bool:
    """Return whether mask and values take less than the elements themselves."""
    return mask_bytes(elements) + nonzero * itemsize < elements * itemsize


def count_nonzero(tensor: Tensor) -> int:
    """Return the number of elements of a contiguous CPU tensor whose bits are not all zero."""
    return int(torch.count_nonzero(_bits(tensor)))


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask (uint8 [elements / 8, rounded up]) and the values [nonzero] of a contiguous CPU tensor."""
    bits = _bits(tensor)
    nonzero = bits != 0
    mask = torch.from_numpy(np.packbits(nonzero.numpy(), bitorder="little"))
    return mask, bits[nonzero].view(tensor.dtype)


def joined(mask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor [*shape] of a mask and its values.

    Raises:
        Malformed: they do not belong together, or to that shape.
    """
    elements = int(np.prod(shape, dtype=object))
    if mask.numel() != mask_bytes(elements):
        raise Malformed(f"has a mask of {mask.numel()} bytes, where {elements} elements take {mask_bytes(elements)}")
    places = np.unpackbits(mask.numpy(), bitorder="little")
    if places[elements:].any() or int(places.sum()) != values.numel():
        raise Malformed(f"has {values.numel()} values, and its mask has places for {int(places.sum())}")
    tensor = torch.zeros(elements, dtype=BITS[values.dtype.itemsize])
    tensor[torch.from_numpy(places[:elements]).bool()] = values.view(tensor.dtype)
    return tensor.view(values.dtype).reshape(shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(BITS[tensor.dtype.itemsize])
