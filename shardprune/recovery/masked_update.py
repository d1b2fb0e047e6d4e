"""Products with a weight's masked low-rank update, W + mask * (scale * B A) with mask = (W != 0), and their gradients.

Weight and update, and the gradient of their size from which those of A and B come, exist a block of rows or columns at
a time. On GPUs each is one kernel (`masked_update_kernel`) beside the product that it belongs to, elsewhere a few
operations of torch.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from shardprune.solvers.kernels import kernels_run

Way = Literal["kernel", "products"]

BLOCK = 2048  # rows or columns of a weight that are in memory at a time
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class MaskedUpdate(torch.autograd.Function):
    """inputs (mask * (scale * B A))^T, or with `whole` inputs (W + mask * (scale * B A))^T.

    The sum of a weight and its update is made anew for the backward pass: kept for all layers, it would take as much
    memory as the model.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, whole: bool) -> Tensor:
        ctx.save_for_backward(inputs)
        # Parameters, not their data: ZeRO-3 frees it after the forward and gathers it again for the backward pass.
        ctx.parameters, ctx.how = (weight, a, b), (scale, whole)
        tokens = inputs.reshape(-1, inputs.shape[-1])
        output = tokens.new_empty(len(tokens), len(weight))
        for start in range(0, len(weight), BLOCK):
            block = slice(start, start + BLOCK)
            part = _masked_sum(weight[block], a, b[block], scale, whole)
            torch.mm(tokens, part.t(), out=output[:, block])
        # No view, which a model could not change in place.
        return torch.ops.aten._unsafe_view(output, (*inputs.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), (weight, a, b), (scale, whole) = ctx.saved_tensors, ctx.parameters, ctx.how
        gradient = gradients[0].reshape(-1, len(weight))
        tokens = inputs.reshape(-1, inputs.shape[-1])
        to_inputs = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        to_a, to_b = torch.empty_like(a), torch.zeros_like(b, dtype=torch.promote_types(b.dtype, torch.float32))
        for start in range(0, weight.shape[1], BLOCK):
            block = slice(start, start + BLOCK)
            part, part_of_a = weight[:, block], a[:, block]
            if to_inputs is not None:
                torch.mm(gradient, _masked_sum(part, part_of_a, b, scale, whole), out=to_inputs[:, block])
            of_a, of_b = _factor_gradients(gradient.t() @ tokens[:, block], part, part_of_a, b)
            to_a[:, block] = of_a.mul_(scale)
            to_b += of_b
        of_inputs = None if to_inputs is None else to_inputs.view_as(inputs)
        return of_inputs, None, to_a, to_b.mul_(scale).to(b.dtype), None, None


def way_of(weight: Tensor) -> Way:
    """Return how the update of a weight is made where the weight is: `kernel` (Triton), or by torch's `products`."""
    return "kernel" if weight.dtype in KERNEL_DTYPES and kernels_run(weight.device) else "products"


def _masked_sum(weight: Tensor, a: Tensor, b: Tensor, scale: float, whole: bool) -> Tensor:
    """Return the masked update [rows, cols], or weight plus update if `whole`."""
    if way_of(weight) == "kernel":
        from shardprune.recovery import masked_update_kernel  # which imports Triton

        return masked_update_kernel.masked_sum(weight, a, b, scale, whole)
    update = (b * scale) @ a  # scaled while it is small
    return (update.add_(weight) if whole else update).masked_fill_(weight == 0, 0)


def _factor_gradients(gradient: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return B^T G and G A^T, [rank, cols] and [rows, rank], for G = mask * `gradient` [rows, cols], overwritten."""
    if way_of(weight) == "kernel":
        from shardprune.recovery import masked_update_kernel

        return masked_update_kernel.factor_gradients(gradient, weight, a, b)
    masked = gradient.masked_fill_(weight == 0, 0)
    return b.t() @ masked, masked @ a.t()
