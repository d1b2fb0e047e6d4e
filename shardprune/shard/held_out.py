"""The part of a worker that judges steps which are meant to improve a layer, by windows that these steps never see.

The driver has every worker `aim` its held-out waves before a layer changes: their dense activations become the outputs
of the dense layer, at which the layer aims. The layer `miss`es them by so much. Before a step, `remember` keeps the
projections that it changes; if the layer misses by more after it, `put_back` undoes it.
"""

import torch
from torch import Tensor

from shardprune.model.skeleton import projection_weight
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.verbs import verb


class HeldOut:
    """Held-out waves of a worker, and the projections of the layer in work before the last step."""

    def __init__(self, worker: ForwardWorker) -> None:
        self.ledger, self.spec = worker.ledger, worker.spec
        self._worker, self._skeleton = worker, worker.skeleton
        self._remembered: dict[str, Tensor] = {}

    @verb("propagate", layer="index")
    def aim(self, stream: str, wave: int, index: int) -> list[float]:
        """Replace the dense activations of a kept wave by their image under the layer, which is dense; return
        ||output - input||^2 of each sequence."""
        worker, dense = self._worker, dense_stream(stream)
        hidden = worker.activations.get(dense, wave)
        image = self._image(index, hidden)
        found = self._squares(image, hidden)
        worker.activations.replace(dense, wave, image)
        return found

    @verb("forward", layer="index")
    def miss(self, stream: str, wave: int, index: int) -> list[float]:
        """Return ||output - dense output||^2 of each sequence of a kept wave, by the layer as it is now."""
        worker = self._worker
        image = self._image(index, worker.activations.get(stream, wave))
        return self._squares(image, worker.activations.get(dense_stream(stream), wave))

    @verb("exchange", layer="index")
    def remember(self, index: int, names: tuple[str, ...]) -> None:
        """Keep a copy of some of the layer's projections, in the place of those kept before."""
        layer = self._worker.in_work(index)
        self._remembered = {name: projection_weight(layer, name).clone() for name in names}

    @verb("exchange", layer="index")
    def put_back(self, index: int) -> None:
        """Undo what has happened to the projections since they were remembered."""
        layer = self._worker.in_work(index)
        for name, weight in self._remembered.items():
            projection_weight(layer, name).copy_(weight)
        self.forget()

    def forget(self) -> None:
        """Forget the projections that are remembered."""
        self._remembered = {}

    def _image(self, index: int, hidden: Tensor) -> Tensor:
        """Return the image of a wave under the layer as it is now."""
        layer = self._worker.in_work(index)
        return self._skeleton.forward_layer(layer, hidden, self._skeleton.layer_arguments(index, *hidden.shape[:2]))

    def _squares(self, one: Tensor, other: Tensor) -> list[float]:
        """Return ||one - other||^2 of each sequence of two waves, by their hidden states."""
        return squares(self._skeleton.states(one), self._skeleton.states(other))


def squares(one: Tensor, other: Tensor) -> list[float]:
    """Return ||one - other||^2 of each sequence of two waves of hidden states [wave, seqlen, hidden]."""
    return (one.float() - other.float()).square_().sum((1, 2), dtype=torch.float64).tolist()
