"""The decoder layers that a worker has in memory: its whole shard, or one and the next."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, Protocol

from torch import nn

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
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

    Resident layers stay in memory. Streamed ones are replaced by the next one used, which a thread reads ahead: two
    layers at most are in memory. Without a `journal` no layer is finished.
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
        self._next: tuple[int, State, Future[nn.Module]] | None = None
        self.load_seconds = 0.0

    def get(self, index: int, version: Version) -> nn.Module:
        """Return the layer `index` on the device."""
        state = self._wanted(index, version)
        if index in self._held and self._held[index][0] == state:
            return self._held[index][1]
        started = time.monotonic()
        if self._stream:
            self._held.clear()
        self._held.pop(index, None)
        self._held[index] = (state, self._fetch(index, state))
        if self._stream and index + 1 in self._indices:
            ahead = self._wanted(index + 1, version)
            self._next = (index + 1, ahead, self._reader.submit(self._read, index + 1, ahead))
        self.load_seconds += time.monotonic() - started
        return self._held[index][1]

    def mark_pruned(self, index: int, layer: nn.Module | None = None) -> None:
        """Take the layer `index` in memory, or the one given, for the finished one that was written."""
        self._finished.add(index)
        self._held[index] = ("pruned", layer or self._held[index][1])

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

    def _fetch(self, index: int, state: State) -> nn.Module:
        if self._next:
            ahead, ahead_state, future = self._next
            self._next = None
            layer = future.result()
            if (ahead, ahead_state) == (index, state):
                return layer
        return self._read(index, state)

    def _read(self, index: int, state: State) -> nn.Module:
        names = self._skeleton.layer_tensors(index)
        if state == "pruned":
            assert self._journal is not None
            return self._pruned.build_layer(index, self._journal.read_layer(index, names))
        given = {}
        if state == "given":
            assert self._given is not None
            projections = self._skeleton.family.projections
            given = {self._skeleton.projection_tensor(index, name): self._given for name in projections}
        tensors = ((name, given.get(name, self._checkpoint).read(name)) for name in names)
        return self._skeleton.build_layer(index, tensors)
