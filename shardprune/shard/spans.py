"""The part of a worker that knows what the layers of the original model did: its `span` of them stands behind every
layer that is left where others went.

Before a layer that is left is trained, the driver has the workers `depart` with the dense activations of its held-out
windows, carries the dense activations of all windows over the layers of the span (`carry`), has the last of these
freed (`forget_original`), and learns by `aim` how far they have come.
"""

from torch import Tensor, nn

from shardprune.shard.current_layers import original_layer
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.held_out import squares
from shardprune.shard.verbs import verb


class Spans:
    """One layer of the original model, and held-out activations as they entered the span in work."""

    def __init__(self, worker: ForwardWorker) -> None:
        self.ledger, self.spec = worker.ledger, worker.spec
        self._worker, self._skeleton = worker, worker.skeleton
        self._original: tuple[int, nn.Module] | None = None
        self._entered: dict[int, Tensor] = {}  # by wave

    @verb("exchange")
    def depart(self, stream: str, wave: int, index: int) -> None:
        """Keep a copy of the dense activations of a wave, which enter the span of a layer."""
        self._entered[wave] = self._worker.activations.get(dense_stream(stream), wave).clone()

    @verb("propagate", layer="index")
    def carry(self, stream: str, wave: int, index: int) -> None:
        """Replace the dense activations of a wave by their image under a layer of the original model."""
        if self._original is None or self._original[0] != index:
            self._original = None
            self._original = index, original_layer(self._skeleton, self._worker.checkpoint, index)
        activations, dense = self._worker.activations, dense_stream(stream)
        hidden = activations.get(dense, wave)
        arguments = self._skeleton.layer_arguments(index, *hidden.shape[:2])
        activations.replace(dense, wave, self._skeleton.forward_layer(self._original[1], hidden, arguments))

    @verb("exchange")
    def forget_original(self) -> None:
        """Free the layer of the original model."""
        self._original = None

    @verb("forward", layer="index")
    def aim(self, stream: str, wave: int, index: int) -> list[float]:
        """Return ||output - input||^2 of each sequence of a wave under the span of a layer, which it has passed."""
        passed, entered = self._worker.activations.get(dense_stream(stream), wave), self._entered.pop(wave)
        return squares(self._skeleton.states(passed), self._skeleton.states(entered))
