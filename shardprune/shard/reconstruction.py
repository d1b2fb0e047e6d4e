"""The part of a worker that trains the kept weights of a pruned layer towards the dense layer's output.

One worker owns the training of a layer. The driver has the others `lend` it their windows, in the pruned model's
activations and the dense ones behind the layer, and lets it `reconstruct` the layer.
"""

import torch
from torch import Tensor

from shardprune.model.skeleton import projection_weight
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.gradients import power_near_one, repeatable
from shardprune.shard.peers import travels
from shardprune.shard.taps import run_with
from shardprune.shard.verbs import verb
from shardprune.solvers.training import BETAS, RATE, rate_at

Place = tuple[str, int, int]  # of a window: the stream and the wave in which it is kept, and its row there


class Reconstruction:
    """The training of the layer in work; float32 weights and Adam's moments are there while it lasts."""

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
        layer = self._worker.in_work(index)
        weights = {name: projection_weight(layer, name) for name in names}
        masks = {name: weight != 0 for name, weight in weights.items()}
        masters = {name: torch.nn.Parameter(weight.float()) for name, weight in weights.items()}
        # One projection at a time: temporaries of all at once would be as large as another copy of the layer.
        optimizer = torch.optim.Adam(
            [{"params": [masters[name]], "lr": _rate(masters[name], masks[name])} for name in names],
            betas=BETAS,
            foreach=False,
            fused=False,
        )
        full = [group["lr"] for group in optimizer.param_groups]
        for step, batch in enumerate(batches):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * rate_at(step, len(batches))
            self._learn(index, batch, masters, masks, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        stored = self._worker.stored_dtypes(index, names)
        for name, weight in weights.items():
            weight.copy_(masters[name].to(stored[name]))
        return {name: int((weight == 0).sum()) for name, weight in weights.items()}

    # -- inside -----------------------------------------------------------------------------------------------

    def _learn(
        self,
        index: int,
        batch: list[Place],
        masters: dict[str, torch.nn.Parameter],
        masks: dict[str, Tensor],
        norm: float,
    ) -> None:
        """Give the masters [rows, cols] the gradients of the layer's mean squared error over a batch of windows."""
        layer = self._worker.in_work(index)
        hidden, target = self._windows(batch, ""), self._windows(batch, "dense")
        arguments = self._skeleton.layer_arguments(index, *hidden.shape[:2])
        leaves = {name: master.detach().to(hidden.dtype).requires_grad_() for name, master in masters.items()}
        with repeatable(hidden.device, True), torch.enable_grad():
            image = self._skeleton.states(run_with(layer, leaves, hidden, arguments))
            error = image.float() - self._skeleton.states(target).float()
            power = power_near_one(error.detach())
            (error.square().sum() * power).backward()
        for name, leaf in leaves.items():
            if leaf.grad is None:  # an expert that sees no token of the batch
                assert self._skeleton.family.kinds[index].mixture_of(name)
                continue
            masters[name].grad = leaf.grad.float().div_(power * len(batch) * norm).mul_(masks[name])

    def _windows(self, batch: list[Place], of: str) -> Tensor:
        """Return the windows [batch, seqlen, hidden] of some places, in the pruned model or the dense one."""
        activations = self._worker.activations
        return torch.stack(
            [activations.get(dense_stream(stream) if of else stream, wave)[row] for stream, wave, row in batch]
        )


def _rate(weight: Tensor, mask: Tensor) -> float:
    """Return the full rate of a projection, by the root mean square of the weights that are kept."""
    kept = int(mask.sum())
    return RATE * float(torch.linalg.vector_norm(weight)) / max(kept, 1) ** 0.5


def lent_stream(stream: str) -> str:
    """Return the name of the windows that other workers have lent for training."""
    return f"{stream}, lent"
