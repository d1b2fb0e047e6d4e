"""The dense projections of the layer in work, beside the pruned ones that take their place in it."""

from collections.abc import Iterable

from torch import Tensor

from shardprune.model.skeleton import projection_weight
from shardprune.shard.forward_worker import ForwardWorker


class DenseWeights:
    """Copies of the projections of one layer, as they were before anything became zero."""

    def __init__(self, worker: ForwardWorker) -> None:
        self._worker = worker
        self._index: int | None = None
        self._weights: dict[str, Tensor] = {}

    def keep(self, index: int) -> None:
        """Copy the projections of a dense layer."""
        layer = self._worker.layers.get(index, "dense")
        names = self._worker.skeleton.family.kinds[index].projections
        self._index, self._weights = index, {name: projection_weight(layer, name).clone() for name in names}

    def of(self, index: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the dense weights [rows, cols] of a layer's projections by name, all unless `names` are given."""
        assert self._index == index, f"the dense weights of layer {index} are not here"
        return self._weights if names is None else {name: self._weights[name] for name in names}

    def drop(self) -> None:
        """Forget them."""
        self._index, self._weights = None, {}
