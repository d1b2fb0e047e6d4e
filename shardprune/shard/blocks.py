"""The two blocks of a decoder layer, attention and MLP: their output errors, gradients, and new masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardprune.errors import SolverError
from shardprune.model.skeleton import projection_weight
from shardprune.model.stand_ins import Arguments
from shardprune.shard.gradients import power_near_one, repeatable
from shardprune.solvers.barber import Masked, rebuild, scores
from shardprune.solvers.pattern import Pattern
from shardprune.solvers.rebuilding import Rebuilding
from shardprune.solvers.statistics import Summed


class SquaredGradients(Summed):
    """Squares of the gradients of a block's output error by its dense weights, float32 [rows, cols] by projection,
    summed over sequences."""

    def __init__(self, dense: Mapping[str, Tensor]) -> None:
        self.squares = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in dense.items()}
        self.samples = 0

    def tensors(self) -> dict[str, Tensor]:
        return self.squares

    def add(self, gradients: Sequence[Tensor], scale: float) -> None:
        """Add one sequence's gradients, which are too large by the factor `scale`."""
        self.samples += 1
        for square, gradient in zip(self.squares.values(), gradients, strict=True):
            square += gradient.float().div_(scale).square_()

    def mean(self, name: str, label: str) -> Tensor:
        """Return the mean squared gradient of a projection, float32 [rows, cols].

        Raises:
            SolverError: it is not finite; names the projection.
        """
        squares = self.squares[name] / self.samples
        if not bool(torch.isfinite(squares).all()):
            raise SolverError(f"{label} {name}: its gradients are not finite: the activations overflow")
        return squares


class _Reached(Exception):
    """Ends a layer's forward pass at a block's output."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class Block:
    """One block of a layer that is being rebuilt, on one replica.

    The layer holds the sparse weights; `dense` are those of the block's projections before they were pruned,
    in the order of the forward pass and the dtype of the computation. The output of a block is that of its last
    projection: once it is added to the residual stream, 16-bit numbers no longer resolve the difference of two.

    Args:
        last: the module that gives the output, where it is not the last projection.
    """

    def __init__(self, layer: nn.Module, dense: dict[str, Tensor], last: str | None = None) -> None:
        self.layer = layer
        self.dense = dense
        self.last = layer.get_submodule(last or list(dense)[-1])

    def compare(self, hidden: Tensor, arguments: Arguments, gradients: SquaredGradients | None) -> tuple[float, float]:
        """Run one wave [wave, seqlen, hidden] of the sparse model's activations through the block, dense and
        sparse.

        Args:
            arguments: of the layer's forward pass, for one sequence.
            gradients: takes the squares of each sequence's gradient of ||dense - sparse||^2 by the dense weights; None
                where they are not needed.

        Returns ||dense - sparse||^2 and ||dense||^2 of the outputs.
        """
        lost = norm = 0.0
        for sequence in hidden.split(1):
            with repeatable(hidden.device, gradients is not None):
                sparse = self._output({}, sequence, arguments)
                with torch.set_grad_enabled(gradients is not None):
                    leaves = {
                        name: weight.detach().requires_grad_(gradients is not None)
                        for name, weight in self.dense.items()
                    }
                    dense = self._output(leaves, sequence, arguments)
                    error = dense.float() - sparse.float()
                    loss = error.square().sum()
                    scale = power_near_one(error.detach())
                    scaled = loss * scale
                if gradients is not None:
                    gradients.add(torch.autograd.grad(scaled, list(leaves.values()), materialize_grads=True), scale)
            lost += float(loss.detach())
            norm += float(dense.detach().float().square().sum())
        return lost, norm

    def rebuild(
        self, settings: Rebuilding, patterns: Mapping[str, Pattern], gradients: SquaredGradients | None, label: str
    ) -> tuple[int, dict[str, int]]:
        """Swap weights of the block's projections in the layer.

        Returns how many pairs, and each projection's zeros: pairs of a whole block may lie in two projections,
        so that its zeros move between them; any other granularity leaves every projection as many as it had.

        Args:
            gradients: those of all replicas, where the settings need them.

        Raises:
            SolverError: a gradient is not finite.
        """
        swaps = 0
        if settings.threshold > 0:
            names = list(self.dense)
            for paired in [names] if settings.granularity == "block" else [[name] for name in names]:
                swaps += self._swap(paired, settings, patterns, gradients, label)
        return swaps, {name: int((projection_weight(self.layer, name) == 0).sum()) for name in self.dense}

    def _swap(
        self,
        names: list[str],
        settings: Rebuilding,
        patterns: Mapping[str, Pattern],
        gradients: SquaredGradients | None,
        label: str,
    ) -> int:
        """Swap weights of projections that are paired together; returns how many pairs."""
        masked = []
        for name in names:
            mask = projection_weight(self.layer, name) == 0
            squares = gradients.mean(name, label) if gradients else None
            masked.append(Masked(scores(settings.metric, self.dense[name], squares, mask), mask, patterns[name]))
        masks, swaps = rebuild(masked, settings.granularity, settings.threshold)
        for name, old, mask in zip(names, masked, masks, strict=True):
            weight = projection_weight(self.layer, name)
            weight.masked_fill_(mask, 0)
            weight.copy_(torch.where(old.mask & ~mask, self.dense[name], weight))
            assert torch.equal(weight == 0, mask), f"{label} {name}: the zeros are not those of the mask"
            assert old.pattern.holds(weight), f"{label} {name}: the new zeros break the pattern {old.pattern}"
        before, after = (sum(int(mask.sum()) for mask in some) for some in ((old.mask for old in masked), masks))
        assert before == after, f"{label} {', '.join(names)}: {after} zeros, not {before}"
        return swaps

    def _output(self, weights: Mapping[str, Tensor], hidden: Tensor, arguments: Arguments) -> Tensor:
        """The block's output for hidden states that enter the layer, with the given projections in the place
        of the layer's own."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(output[0] if isinstance(output, tuple) else output)

        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        call = arguments.call(hidden)
        hook = self.last.register_forward_hook(stop)
        try:
            torch.func.functional_call(self.layer, replaced, call.positional, call.keywords)
        except _Reached as reached:
            return reached.output.reshape(*hidden.shape[:2], -1)
        finally:
            hook.remove()
        raise AssertionError("the layer has not run the block's last projection")
