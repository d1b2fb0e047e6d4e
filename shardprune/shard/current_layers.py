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
    """Layer files of an iteration: their folder, the widths of the layers, and which layers they are, in the
    files' order, by their index in the checkpoint."""

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
        """The layers that are held, in ascending order."""
        return sorted(self._layers)

    def read(self, indices: Iterable[int]) -> None:
        """Hold these layers and no others, as the checkpoint has them."""

        def read(index: int) -> nn.Module:
            names = self._skeleton.layer_tensors(index)
            return self._skeleton.build_layer(index, ((name, self._checkpoint.read(name)) for name in names))

        self._hold(indices, read)

    def read_saved(self, indices: Iterable[int], journal: Journal, saved: Sequence[int], blanks: Skeleton) -> None:
        """Hold these layers and no others, from files of the layers `saved` in their order."""

        def read(index: int) -> nn.Module:
            place = saved.index(index)
            return blanks.build_layer(place, journal.read_layer(place, self._skeleton.layer_tensors(place)))

        self._hold(indices, read)

    def _hold(self, indices: Iterable[int], read: Callable[[int], nn.Module]) -> None:
        started = time.monotonic()
        self._layers.clear()
        for index in indices:
            self._layers[index] = read(index)
        self.load_seconds += time.monotonic() - started

    def get(self, index: int, version: Version) -> nn.Module:
        """The current layer `index`; there is no other version of it."""
        assert version == "dense"
        return self._layers[index]

    def put(self, layers: Mapping[int, nn.Module]) -> None:
        """Let layers take the place of those with the same indices."""
        self._layers.update(layers)

    def pop(self, index: int) -> nn.Module:
        """Give a layer up."""
        return self._layers.pop(index)

    def release(self) -> None:
        """Nothing: layers stay until they are given up."""


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's parameters on the CPU by their names within it, ready to travel."""
    return {name: parameter.cpu() for name, parameter in layer.named_parameters()}
