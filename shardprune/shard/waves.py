"""Waves: micro-batches of sequences that move from shard to shard."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from shardprune.shard.streams import Moment, SideStream, host_memory, to_device, used_here


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

    Waves of a GPU that are kept on the host lie in pinned memory. While one is in work, the next of its stream comes to
    the device on a side stream, and the image of the one before goes back on another.
    """

    def __init__(self, device: torch.device, place: Literal["device", "host"]) -> None:
        self._device = device
        self._held = device if place == "device" else torch.device("cpu")
        self._waves: dict[tuple[str, int], Tensor] = {}
        self.on_host = self._held.type == "cpu"
        self._away = self._held != device
        self._coming, self._going = SideStream(device), SideStream(device)
        self._whole: dict[tuple[str, int], Moment] = {}  # of waves that go back to the host: when they are there
        self._next: _Coming | None = None

    def put(self, stream: str, wave: int, hidden: Tensor) -> None:
        """Keep a copy of a wave [wave, seqlen, hidden]: tensors that arrive from other processes may be read-only."""
        if self._held.type == "cpu":
            self._waves[stream, wave] = host_memory(hidden, self._device)
            self.replace(stream, wave, hidden)
        elif hidden.device.type == "cpu":
            self._waves[stream, wave] = to_device(hidden, self._device)
        else:
            self._waves[stream, wave] = hidden.clone(memory_format=torch.contiguous_format)

    def replace(self, stream: str, wave: int, hidden: Tensor) -> None:
        """Overwrite a wave with its image under a layer."""
        kept = self._waves[stream, wave]
        if self._next and self._next.key == (stream, wave):
            self._next = None
        if kept.device == hidden.device:
            kept.copy_(hidden)
            return
        with self._coming.after():
            read = Moment.now(self._device)  # nothing comes from this memory any more
        with self._going.after(Moment.now(self._device), read):
            kept.copy_(hidden, non_blocking=True)
            used_here(hidden)
            self._whole[stream, wave] = Moment.now(self._device)

    def get(self, stream: str, wave: int) -> Tensor:
        """Return a wave on the device."""
        if not self._away:
            return self._waves[stream, wave]
        coming, self._next = self._next, None
        if coming is None or coming.key != (stream, wave):
            coming = self._fetch((stream, wave))
        if following := self._following(stream, wave):
            self._next = self._fetch(following)
        return coming.arrived()

    def take(self, stream: str, wave: int) -> Tensor:
        """Remove a wave and return it where it is kept."""
        key = stream, wave
        if moment := self._whole.pop(key, None):
            moment.wait()
        if self._next and self._next.key == key:
            self._next = None
        return self._waves.pop(key)

    def fork(self, stream: str, into: str) -> None:
        """Copy all waves of a stream to another."""
        for key in [key for key in self._waves if key[0] == stream]:
            if key in self._whole:
                self._whole[key].wait()
            self.put(into, key[1], self._waves[key])

    def drop(self, stream: str) -> None:
        """Forget all waves of a stream."""
        if self._next and self._next.key[0] == stream:
            self._next = None
        for key in [key for key in self._waves if key[0] == stream]:
            del self._waves[key]
            self._whole.pop(key, None)

    def _following(self, stream: str, wave: int) -> tuple[str, int] | None:
        """Return the key of the wave that was kept after another of its stream: workers take them in this order."""
        keys = [key for key in self._waves if key[0] == stream]
        place = keys.index((stream, wave)) + 1
        return keys[place] if place < len(keys) else None

    def _fetch(self, key: tuple[str, int]) -> "_Coming":
        """Begin to copy a wave to the device."""
        whole = [self._whole[key]] if key in self._whole else []
        with self._coming.after(*whole):
            tensor = self._waves[key].to(self._device, non_blocking=True)
            return _Coming(key, tensor, Moment.now(self._device))


@dataclass(frozen=True)
class _Coming:
    """A wave on its way to the device."""

    key: tuple[str, int]
    tensor: Tensor
    there: Moment

    def arrived(self) -> Tensor:
        """Return the wave, for work on the current stream."""
        self.there.precedes_what_follows()
        used_here(self.tensor)
        return self.tensor
