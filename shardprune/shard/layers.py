"""The decoder layers that a worker has in memory: its whole shard, or one and the next."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.shard.device_reader import DeviceReader
from shardprune.shard.streams import Moment, SideStream, used_here
from shardprune.storage.journal import Journal

# latest: the pruned layer if it is finished, else the dense one; given: with the sparse checkpoint's projections;
# narrowed: with fewer groups and neurons, but not finished yet
Version = Literal["dense", "latest", "given", "narrowed"]
State = Literal["dense", "pruned", "given"]  # of a layer in memory


class LayerStore(Protocol):
    """The decoder layers of a worker; `load_seconds` were spent on reading them."""

    load_seconds: float

    def get(self, index: int, version: Version) -> nn.Module:
        """Return the layer `index` on the device."""

    def release(self) -> None:
        """Free what only a finished pass needed."""


class Layers:
    """Decoder layers by index, read at first use.

    Resident layers stay in memory. Streamed ones are replaced by the next one used, which a thread reads ahead, in
    either direction: two layers at most are in memory. A GPU's come on a side stream. Without a `journal` no layer is
    finished.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        checkpoint: Checkpoint,
        journal: Journal | None,
        indices: Sequence[int],
        finished: set[int],
        stream: bool,
        given: Checkpoint | None = None,
        pruned: Skeleton | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._pruned = pruned or skeleton  # which has the shape of finished layers
        self._checkpoint = checkpoint
        self._journal = journal
        self._indices = indices
        self._finished = finished
        self._stream = stream
        self._given = given
        self._held: dict[int, tuple[State, nn.Module]] = {}
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._next: tuple[int, State, Future[_Read]] | None = None
        self._device = skeleton.device
        self._coming = SideStream(self._device)
        self._device_reader = DeviceReader(self._device) if self._device.type == "cuda" else None
        self.load_seconds = 0.0

    def get(self, index: int, version: Version) -> nn.Module:
        """Return the layer `index` on the device."""
        state = self._wanted(index, version)
        if index in self._held and self._held[index][0] == state:
            return self._held[index][1]
        started = time.monotonic()
        step = -1 if self._stream and index + 1 in self._held else 1
        if self._stream:
            self._held.clear()
        self._held.pop(index, None)
        freed = Moment.now(self._device)  # the memory of the layer before
        self._held[index] = (state, self._fetch(index, state, freed))
        if self._stream and index + step in self._indices:
            ahead = self._wanted(index + step, version)
            self._next = (index + step, ahead, self._reader.submit(self._read, index + step, ahead, freed))
        self.load_seconds += time.monotonic() - started
        return self._held[index][1]

    def mark_pruned(self, index: int, layer: nn.Module | None = None) -> None:
        """Take the layer `index` in memory, or the one given, for the finished one that was written."""
        self._finished.add(index)
        self._held[index] = ("pruned", layer or self._held[index][1])

    def mark_written(self, index: int) -> None:
        """Take the layer `index` for finished, whose file another worker may have written; it is read at its next
        use."""
        self._finished.add(index)

    def release(self) -> None:
        """Drop every layer."""
        self._held.clear()
        if self._next:
            self._next[2].result()
        self._next = None

    def _wanted(self, index: int, version: Version) -> State:
        if version == "latest":
            return "pruned" if index in self._finished else "dense"
        assert version != "narrowed", "narrowed layers are in no file"
        return version

    def _fetch(self, index: int, state: State, freed: Moment) -> nn.Module:
        if self._next:
            ahead, ahead_state, future = self._next
            self._next = None
            read = future.result()
            if (ahead, ahead_state) == (index, state):
                return read.arrived()
        return self._read(index, state, freed).arrived()

    def _read(self, index: int, state: State, freed: Moment) -> "_Read":
        """Read a layer; streamed, once the device has done its work with the layer whose memory it takes."""
        if self._stream:
            freed.wait()
        skeleton = self._pruned if state == "pruned" else self._skeleton
        names = skeleton.layer_tensors(index)
        if state == "pruned":
            assert self._journal is not None
            stored = self._journal.stored_layer(index, names)
        else:
            given = {}
            if state == "given":
                assert self._given is not None
                projections = self._skeleton.family.kinds[index].projections
                given = {self._skeleton.projection_tensor(index, name): self._given for name in projections}
            stored = {name: given.get(name, self._checkpoint).stored(name) for name in names}
        with self._coming.after():
            if self._device_reader:
                layer = skeleton.build_layer(index, self._device_reader.read(stored))
            else:
                layer = skeleton.build_layer(index, ((name, tensor.read()) for name, tensor in stored.items()))
            if state != "pruned":
                self._checkpoint.check_unchanged(names)
            if self._given and state == "given":
                self._given.check_unchanged(names)
            return _Read(layer, Moment.now(self._device))


@dataclass(frozen=True)
class _Read:
    """A layer that has been read, and the moment at which it is on the device."""

    layer: nn.Module
    there: Moment

    def arrived(self) -> nn.Module:
        """Return the layer, for work on the current stream."""
        self.there.precedes_what_follows()
        for parameter in self.layer.parameters():
            used_here(parameter)
        return self.layer
