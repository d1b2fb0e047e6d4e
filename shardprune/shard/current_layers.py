"""The decoder layers of a worker whose model changes from iteration to iteration, kept in its memory."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import Widths
from shardprune.shard.layers import Version
from shardprune.storage.journal import Journal


@dataclass(frozen=True)
class Saved:
    """The layer files of an iteration: their folder, the widths of the layers, and the layers' indices in the original
    checkpoint in the order of the files."""

    folder: str
    widths: Widths
    layers: tuple[int, ...]


class CurrentLayers:
    """Current decoder layers by their index in the checkpoint."""

    def __init__(self, skeleton: Skeleton, checkpoint: Checkpoint) -> None:
        self._skeleton = skeleton
        self._checkpoint = checkpoint
        self._layers: dict[int, nn.Module] = {}
        self.load_seconds = 0.0

    @property
    def indices(self) -> list[int]:
        """The indices of the layers in memory, ascending."""
        return sorted(self._layers)

    def read(self, indices: Iterable[int]) -> None:
        """Keep these layers and no others, read from the checkpoint."""

        self._layers.clear()
        self._hold(indices, lambda index: original_layer(self._skeleton, self._checkpoint, index))

    def read_saved(self, indices: Iterable[int], journal: Journal, saved: Sequence[int], blanks: Skeleton) -> None:
        """Keep these layers and no others, read from the files of the layers `saved` in their order."""

        self._layers.clear()
        self.read_again(indices, journal, saved, blanks)

    def read_again(self, indices: Iterable[int], journal: Journal, saved: Sequence[int], blanks: Skeleton) -> None:
        """Replace some layers by those in the files of the layers `saved` in their order."""

        def read(index: int) -> nn.Module:
            place = saved.index(index)
            return blanks.build_layer(place, journal.read_layer(place, self._skeleton.layer_tensors(place)))

        self._hold(indices, read)

    def _hold(self, indices: Iterable[int], read: Callable[[int], nn.Module]) -> None:
        started = time.monotonic()
        for index in indices:
            self._layers[index] = read(index)
        self.load_seconds += time.monotonic() - started

    def get(self, index: int, version: Version) -> nn.Module:
        """Return the current layer `index`; there is no other version of it."""
        assert version == "dense"
        return self._layers[index]

    def put(self, layers: Mapping[int, nn.Module]) -> None:
        """Replace the layers with the same indices."""
        self._layers.update(layers)

    def pop(self, index: int) -> nn.Module:
        """Remove a layer and return it."""
        return self._layers.pop(index)

    def release(self) -> None:
        """No-op: these layers are always resident."""


def original_layer(skeleton: Skeleton, checkpoint: Checkpoint, index: int) -> nn.Module:
    """Return a layer as it is in the checkpoint.

    Raises:
        InputChanged: the checkpoint is not the one that it was.
    """
    names = skeleton.layer_tensors(index)
    layer = skeleton.build_layer(index, ((name, checkpoint.read(name)) for name in names))
    checkpoint.check_unchanged(names)
    return layer


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's parameters on the CPU by their names within it, as they travel to another worker."""
    return {name: parameter.cpu() for name, parameter in layer.named_parameters()}
