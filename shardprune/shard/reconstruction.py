"""The part of a worker that trains the kept weights of a pruned layer towards the dense layer's output.

One worker owns the training of a layer. The driver has the others `lend` it their windows, in the pruned model's
activations and the dense ones behind the layer, and lets it `reconstruct` the layer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from shardprune.model.skeleton import projection_weight
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.gradients import power_near_one, repeatable
from shardprune.shard.master_weights import MasterWeights
from shardprune.shard.peers import travels
from shardprune.shard.taps import run_with
from shardprune.shard.verbs import verb
from shardprune.solvers.training import rate_at

Place = tuple[str, int, int]  # of a window: the stream and the wave in which it is kept, and its row there


class Reconstruction:
    """The training of the layer in work; float32 weights and Adam's moments are there while it lasts, on the host where
    the device has no room for them."""

    def __init__(self, worker: ForwardWorker) -> None:
        self.ledger, self.spec = worker.ledger, worker.spec
        self._worker, self._skeleton = worker, worker.skeleton

    @travels
    @verb("exchange")
    def lend(self, stream: str, wave: int, rows: tuple[int, ...]) -> Tensor:
        """Hand out a copy of some sequences of a kept wave."""
        return self._worker.leaving(self._worker.activations.get(stream, wave)[list(rows)])

    @verb("solve", layer="index")
    def reconstruct(
        self, index: int, batches: list[list[Place]], norm: float, names: tuple[str, ...]
    ) -> dict[str, int]:
        """Train the weights of linear maps of a layer that are not zero, one step for each of the batches; return the
        zeros of each.

        Args:
            norm: ||dense output - dense input||^2 of a window: the unit of the loss.
            names: of the maps.
        """
        layer, on_host = self._worker.in_work(index), self._worker.trains_on_host()
        masters = {name: MasterWeights(projection_weight(layer, name), on_host) for name in names}
        for step, batch in enumerate(batches):
            for name, gradient in self._gradients(index, batch, masters, norm):
                masters[name].step(gradient, masters[name].rate * rate_at(step, len(batches)))
        stored = self._worker.stored_dtypes(index, names)
        return {name: master.rounded(stored[name]) for name, master in masters.items()}

    # -- inside -----------------------------------------------------------------------------------------------

    def _gradients(
        self, index: int, batch: list[Place], masters: dict[str, MasterWeights], norm: float
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients [rows, cols] of the layer's mean squared error over a batch of windows by linear maps,
        in float32 one at a time."""
        layer = self._worker.in_work(index)
        hidden, target = self._windows(batch, ""), self._windows(batch, "dense")
        arguments = self._skeleton.layer_arguments(index, *hidden.shape[:2])
        leaves = {name: master.weight.detach().requires_grad_() for name, master in masters.items()}
        with repeatable(hidden.device, True), torch.enable_grad():
            image = self._skeleton.states(run_with(layer, leaves, hidden, arguments))
            error = image.float() - self._skeleton.states(target).float()
            power = power_near_one(error.detach())
            (error.square().sum() * power).backward()
        del image, error, hidden, target
        for name, leaf in leaves.items():
            gradient, leaf.grad = leaf.grad, None
            if gradient is None:  # an expert that sees no token of the batch
                assert self._skeleton.family.kinds[index].mixture_of(name)
                continue
            yield name, gradient.float().div_(power * len(batch) * norm)

    def _windows(self, batch: list[Place], of: str) -> Tensor:
        """Return the windows [batch, seqlen, hidden] of some places, in the pruned model or the dense one."""
        activations = self._worker.activations
        return torch.stack(
            [activations.get(dense_stream(stream) if of else stream, wave)[row] for stream, wave, row in batch]
        )


def lent_stream(stream: str) -> str:
    """Return the name of the windows that other workers have lent for training."""
    return f"{stream}, lent"
