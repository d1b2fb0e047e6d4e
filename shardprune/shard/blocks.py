"""The two blocks of a decoder layer, attention and MLP: their output errors, gradients, and new masks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardprune.errors import SolverError
from shardprune.families import ATTENTION
from shardprune.skeleton import projection_weight
from shardprune.solvers.barber import Masked, Rebuilding, rebuild, scores
from shardprune.solvers.pattern import Pattern

Squares = tuple[dict[str, Tensor], int]  # of gradients by projection, summed over some sequences, and their number


class _Reached(Exception):
    """Ends a layer's forward pass at the attention's output."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class Block:
    """One block of a layer that is being rebuilt, on one replica.

    The layer holds the sparse weights; `dense` are those of the block's projections before they were pruned,
    in the dtype of the computation. An attention block's output is the attention module's, the MLP block's is
    the layer's: what the residual stream adds is the same on both sides of a comparison.
    """

    def __init__(self, layer: nn.Module, dense: dict[str, Tensor]) -> None:
        self.layer = layer
        self.dense = dense
        self.is_attention = next(iter(dense)).startswith(f"{ATTENTION}.")
        self.squares: dict[str, Tensor] = {}
        self.samples = 0

    def compare(self, hidden: Tensor, arguments: Mapping[str, Any], gradients: bool) -> tuple[float, float]:
        """Run one wave [wave, seqlen, hidden] of the sparse model's activations through the block, dense and
        sparse.

        Args:
            arguments: of the layer's forward pass, for one sequence.
            gradients: whether to add each sequence's squared gradient of ||dense - sparse||^2 by the dense
                weights to the sums.

        Returns ||dense - sparse||^2 and ||dense||^2 of the outputs.
        """
        lost = norm = 0.0
        for sequence in hidden.split(1):
            with _repeatable(hidden.device):
                sparse = self._output({}, sequence, arguments)
                with torch.set_grad_enabled(gradients):
                    leaves = {name: weight.detach().requires_grad_(gradients) for name, weight in self.dense.items()}
                    dense = self._output(leaves, sequence, arguments)
                    # A mean over tokens alone keeps float16 gradients in range; factors change no order of scores.
                    loss = (dense.float() - sparse.float()).square().sum() / hidden.shape[1]
                if gradients:
                    self._add(torch.autograd.grad(loss, list(leaves.values())))
            lost += float(loss.detach()) * hidden.shape[1]
            norm += float(dense.detach().float().square().sum())
        if gradients:
            self.samples += len(hidden)
        return lost, norm

    def rebuild(
        self, settings: Rebuilding, patterns: Mapping[str, Pattern], parts: Sequence[Squares], label: str
    ) -> tuple[int, dict[str, int]]:
        """Swap weights of the block's projections in the layer.

        Returns how many pairs, and each projection's zeros: pairs of a whole block may lie in two projections,
        so that its zeros move between them; any other granularity leaves every projection as many as it had.

        Args:
            parts: the squared gradients of all replicas in their order.

        Raises:
            SolverError: a gradient is not finite.
        """
        samples = sum(count for _, count in parts)
        if settings.threshold == 0:
            return 0, {name: int((projection_weight(self.layer, name) == 0).sum()) for name in self.dense}
        masked = {}
        for name, dense in self.dense.items():
            mask = projection_weight(self.layer, name) == 0
            squares = None
            if settings.needs_gradients:
                squares = torch.zeros_like(dense, dtype=torch.float32)
                for part, _ in parts:
                    squares += part[name].to(dense.device)
                squares /= samples
                if not bool(torch.isfinite(squares).all()):
                    raise SolverError(f"{label} {name}: its gradients are not finite: the activations overflow")
            masked[name] = Masked(scores(settings.metric, dense, squares, mask), mask, patterns[name])
        masks, swaps = rebuild(list(masked.values()), settings.granularity, settings.threshold)
        zeros = {name: int(mask.sum()) for name, mask in zip(masked, masks, strict=True)}
        before = {name: int(old.mask.sum()) for name, old in masked.items()}
        assert sum(zeros.values()) == sum(before.values()), f"{label}: the number of zeros changed"
        assert zeros == before or settings.granularity == "block", f"{label}: zeros moved between projections"
        for (name, old), mask in zip(masked.items(), masks, strict=True):
            weight = projection_weight(self.layer, name)
            weight.masked_fill_(mask, 0)
            weight.copy_(torch.where(old.mask & ~mask, self.dense[name], weight))
            assert int((weight == 0).sum()) == zeros[name], f"{label} {name}: the zeros are not those of the mask"
            assert old.pattern.holds(weight), f"{label} {name}: the new zeros break the pattern {old.pattern}"
        return swaps, zeros

    def _add(self, gradients: Sequence[Tensor]) -> None:
        for name, gradient in zip(self.dense, gradients, strict=True):
            square = gradient.float().square_()
            self.squares[name] = self.squares[name].add_(square) if name in self.squares else square

    def _output(self, weights: Mapping[str, Tensor], hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """The block's output for hidden states that enter the layer, with the given projections in the place
        of the layer's own."""

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _Reached(_first(output))

        replaced = {f"{name}.weight": weight for name, weight in weights.items()}
        hook = self.layer.get_submodule(ATTENTION).register_forward_hook(stop) if self.is_attention else None
        try:
            return _first(torch.func.functional_call(self.layer, replaced, (hidden,), dict(arguments)))
        except _Reached as reached:
            return reached.output
        finally:
            if hook:
                hook.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Attention whose gradient is the same to the bit every time: on a GPU the fused kernels add in any order."""
    if device.type == "cuda":
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
