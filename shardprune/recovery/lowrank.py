"""Low-rank updates (LoRA, arXiv 2106.09685) of projections, optionally masked by the weight's zeros.

A masked update is W + mask * (scale * B A) with mask = (W != 0), in training as in the merged model. One module owns
all its tensors, because ZeRO-3 gathers the parameters of a module: weight, A and B are whole while it runs.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

UPDATES = ("lora_A", "lora_B")
BLOCK = 2048  # columns of a weight whose gradient is in memory at a time


class LowRankLinear(nn.Module):
    """A frozen linear map [rows, cols] with an update of rank r, as a replacement for an `nn.Linear`.

    It keeps the linear map's parameter names and adds `lora_A` [r, cols] and `lora_B` [rows, r].
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, masked: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        rows, cols = linear.out_features, linear.in_features
        dtype, device = linear.weight.dtype, linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, cols, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.masked = masked

    def reset(self, generator: torch.Generator) -> None:
        """Initialise as LoRA does: B is zero, A uniform like a linear layer's weight."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.data.copy_(drawn)

    def forward(self, inputs: Tensor) -> Tensor:
        factors = self.lora_A, self.lora_B, self.scale
        drops = self.training and self.dropout.p > 0
        if self.masked and not drops:  # weight and update in one product
            output = _MaskedUpdate.apply(inputs, self.weight, *factors, True)
            return output if self.bias is None else output + self.bias
        output = nn.functional.linear(inputs, self.weight, self.bias)
        dropped = self.dropout(inputs)
        if self.masked:
            return output + _MaskedUpdate.apply(dropped, self.weight, *factors, False)
        return output + nn.functional.linear(nn.functional.linear(dropped, self.lora_A), self.lora_B) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """Return the equivalent weight [rows, cols] in float32; A and B must be whole.

        Args:
            weight: the checkpoint's; the module's own may be rounded to the training precision.
        """
        weight = weight.to(self.lora_A.device, torch.float32)
        update = self.scale * self.lora_B.detach().float() @ self.lora_A.detach().float()
        return weight + (update * (weight != 0) if self.masked else update)


class _MaskedUpdate(torch.autograd.Function):
    """inputs (mask * (scale * B A))^T, or with `whole` inputs (W + mask * (scale * B A))^T.

    The product of B and A has the size of the weight and is recomputed in the backward pass: kept for all layers, it
    would take as much memory as the model. The backward pass makes it, and the gradient of its size that A's and B's
    come from, a block of columns at a time.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, whole: bool) -> Tensor:
        ctx.save_for_backward(inputs)
        # Parameters, not their data: ZeRO-3 frees it after the forward and gathers it again for the backward pass.
        ctx.parameters, ctx.how = (weight, a, b), (scale, whole)
        return nn.functional.linear(inputs, _product(weight, a, b, scale, whole))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), (weight, a, b), (scale, whole) = ctx.saved_tensors, ctx.parameters, ctx.how
        gradient = gradients[0]
        tokens, of_outputs = inputs.flatten(0, -2), gradient.flatten(0, -2)
        to_inputs = torch.empty_like(inputs) if ctx.needs_input_grad[0] else None
        to_a, to_b = torch.empty_like(a), torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
        for start in range(0, weight.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            part, part_of_a = weight[:, block], a[:, block]
            if to_inputs is not None:
                to_inputs[..., block] = gradient @ _product(part, part_of_a, b, scale, whole)
            to_update = (of_outputs.T @ tokens[:, block]).masked_fill_(part == 0, 0)
            to_a[:, block] = (b.T @ to_update).mul_(scale)
            to_b += to_update @ part_of_a.T
        return to_inputs, None, to_a, to_b.mul_(scale).to(b.dtype), None, None


def _product(weight: Tensor, a: Tensor, b: Tensor, scale: float, whole: bool) -> Tensor:
    """Return the masked update [rows, cols], or weight plus update if `whole`."""
    update = (b * scale) @ a  # scaled while it is small
    return (update.add_(weight) if whole else update).masked_fill_(weight == 0, 0)


def add_updates(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float, masked: bool, seed: int
) -> Iterator[LowRankLinear]:
    """Replace every target by a `LowRankLinear` and yield it; initialisation depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for path in targets:
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        module = LowRankLinear(linear, rank, alpha, dropout, masked)
        module.reset(generator)
        setattr(model.get_submodule(parent), name, module)
        yield module
