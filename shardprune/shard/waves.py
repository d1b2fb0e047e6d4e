"""Waves: micro-batches of sequences that move from shard to shard."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor


def split(count: int, parts: int) -> list[range]:
    """Return `parts` contiguous ranges over `count` items, whose lengths differ by one at most."""
    edges = [count * part // parts for part in range(parts + 1)]
    return [range(start, end) for start, end in pairwise(edges)]


@dataclass(frozen=True)
class Wave:
    """The sequences [start, stop) of a window tensor, all on one replica."""

    index: int
    replica: int
    start: int
    stop: int


def waves_of(samples: int, replicas: int, size: int) -> list[Wave]:
    """Return the waves of `samples` sequences in their order: each replica has a contiguous share, cut into waves of at
    most `size` sequences. A replica without sequences has no wave."""
    bounds = [
        (replica, start, min(start + size, share.stop))
        for replica, share in enumerate(split(samples, replicas))
        for start in range(share.start, share.stop, size)
    ]
    return [Wave(index, *bound) for index, bound in enumerate(bounds)]


class Activations:
    """Hidden states of waves by the name of their stream, on the device or in host memory.

    A stream is one journey through the model: the calibration waves of a segment, or the windows of an
    evaluation.
    """

    def __init__(self, device: torch.device, place: Literal["device", "host"]) -> None:
        self._device = device
        self._held = device if place == "device" else torch.device("cpu")
        self._waves: dict[tuple[str, int], Tensor] = {}

    def put(self, stream: str, wave: int, hidden: Tensor) -> None:
        """Keep a copy of a wave [wave, seqlen, hidden]: tensors that arrive from other processes may be read-only."""
        kept = torch.empty_like(hidden, device=self._held, memory_format=torch.contiguous_format)
        self._waves[stream, wave] = kept.copy_(hidden)

    def replace(self, stream: str, wave: int, hidden: Tensor) -> None:
        """Overwrite a wave with its image under a layer."""
        self._waves[stream, wave].copy_(hidden)

    def get(self, stream: str, wave: int) -> Tensor:
        """Return a wave on the device."""
        return self._waves[stream, wave].to(self._device)

    def take(self, stream: str, wave: int) -> Tensor:
        """Remove a wave and return it."""
        return self._waves.pop((stream, wave))

    def fork(self, stream: str, into: str) -> None:
        """Copy all waves of a stream to another."""
        for key in [key for key in self._waves if key[0] == stream]:
            self._waves[into, key[1]] = self._waves[key].clone()

    def drop(self, stream: str) -> None:
        """Forget all waves of a stream."""
        for key in [key for key in self._waves if key[0] == stream]:
            del self._waves[key]
