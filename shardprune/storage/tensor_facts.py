"""Facts about a tensor in a file, found in one reading of its parts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.storage.digests import StreamedDigest
from shardprune.storage.safetensors_file import StoredTensor, bytes_of

PART = 16 * 2**20  # bytes that are looked at at a time, so that what is derived from them stays small, too


@dataclass(frozen=True)
class TensorFacts:
    """The digest of a tensor, and how many of its elements are `zeros`, and `strange`: infinite or no number. `broken`
    is what was counted besides."""

    digest: str
    zeros: int
    strange: int
    broken: int

    @classmethod
    def of(cls, stored: StoredTensor, broken: Callable[[Tensor], int] | None = None) -> "TensorFacts":
        """Return the facts of a tensor, which is read in parts of about PART bytes, whole rows each.

        Args:
            broken: counts something in rows [rows, cols] of a tensor of two dimensions.
        """
        entry, digest = stored.entry, StreamedDigest()
        cols = math.prod(entry.shape[1:]) if entry.shape else 1
        row, size = max(1, cols * entry.dtype.itemsize), entry.size
        step = max(1, PART // row) * row
        buffer = torch.empty(min(step, size), dtype=torch.uint8)
        zeros = strange = counted = 0
        for start in range(0, size, step):
            part = buffer[: size - start]
            stored.read_part(start, part)
            digest.update(bytes_of(part))
            values = part.view(entry.dtype)
            if entry.dtype.itemsize == 1 and entry.dtype.is_floating_point:
                values = values.float()  # torch counts nothing in eight bits
            zeros += values.numel() - int(torch.count_nonzero(values))
            if entry.dtype.is_floating_point:
                strange += int(torch.count_nonzero(~torch.isfinite(values)))
            if broken and len(entry.shape) == 2:
                counted += broken(values.reshape(-1, cols))
        return cls(digest.hexdigest(), zeros, strange, counted)
