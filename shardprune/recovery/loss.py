"""The losses of a training run: next-token cross entropy, and divergence from a teacher.

Logits of all predictions would take gigabytes: 2.1 GB in float32 for 4,096 tokens and a vocabulary of 128,256, several
times over. The head of the model computes its loss a chunk of predictions at a time, and the loss's gradient in the
same pass, while the chunk's logits are there: nothing is computed twice, and only gradients of the size of the head's
input and weight are kept.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shardprune.model.head_logits import HeadLogits
from shardprune.recovery.distillation import CHUNK, Distillation
from shardprune.solvers.products import add_product


class LossHead(nn.Module):
    """The output head of a causal language model with its loss, as a replacement for the head's `nn.Linear`.

    It keeps the linear map's parameter names, and its parameters are whole while it runs, also under ZeRO-3.

    Args:
        made: what the model makes of the head's outputs.
    """

    def __init__(self, head: nn.Linear, made: HeadLogits) -> None:
        super().__init__()
        self.weight, self.bias, self.made = head.weight, head.bias, made

    def forward(self, hidden: Tensor, targets: Tensor, distillation: Distillation | None = None) -> Tensor:
        """Return the summed loss of predictions, float32, computed in float32.

        Args:
            hidden: [predictions, width], the model's last hidden states where something is predicted.
            targets: int64 [predictions], the tokens that follow.
        """
        return _SummedLoss.apply(
            hidden, self.weight, self.bias, targets, self.made, distillation, torch.is_grad_enabled()
        )


class _SummedLoss(torch.autograd.Function):
    """The summed loss of predictions; its forward pass computes the gradients as well."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        made: HeadLogits,
        distillation: Distillation | None,
        learning: bool,
    ) -> Tensor:
        of_hidden, of_weight, of_bias = (learning and needed for needed in ctx.needs_input_grad[:3])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        to_hidden = torch.empty_like(hidden) if of_hidden else None
        # Sums over chunks are float32, whatever the dtype of the weights.
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias and bias is not None else None
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            outputs = nn.functional.linear(hidden[part], weight, bias)
            distilled = distillation and distillation.part(part)
            loss, gradient = loss_and_gradient(outputs, targets[part], made, distilled)
            total += loss
            gradient = gradient.to(weight.dtype)
            if to_hidden is not None:
                torch.mm(gradient, weight, out=to_hidden[part])
            if to_weight is not None:
                add_product(to_weight, gradient.T, hidden[part])
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=torch.float32)
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:

        def scaled(kept: Tensor | None) -> Tensor | None:
            return kept if kept is None else torch.mul(kept, gradients[0], out=torch.empty_like(kept, dtype=ctx.dtype))

        return *map(scaled, ctx.saved_tensors), None, None, None, None


def loss_and_gradient(
    outputs: Tensor, targets: Tensor, made: HeadLogits, distillation: Distillation | None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of predictions, and its gradient for the outputs, float32 [predictions, vocabulary].

    The loss is the cross entropy; with a distillation of weight w, it is w times its divergence plus 1 - w times that.

    Args:
        outputs: of the head [predictions, vocabulary], of any dtype.
        targets: int64 [predictions].
        made: what the model makes of them.
    """
    given = made.of(outputs)
    loss, gradient = cross_entropy(given, targets)
    if distillation is not None:
        distilled, towards = distillation.divergence(given)
        loss = torch.lerp(loss, distilled, distillation.weight)
        gradient = gradient.lerp_(towards, distillation.weight)
    return loss, made.to_outputs(gradient, given)


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross entropy of predictions, and its gradient for their logits, both in float32.

    Args:
        logits: [predictions, vocabulary], of any dtype.
        targets: int64 [predictions].
    """
    chances = torch.log_softmax(logits, dim=1, dtype=torch.float32)
    places = targets[:, None]
    loss = -chances.gather(1, places).sum()
    gradient = chances.exp_()
    return loss, gradient.scatter_add_(1, places, gradient.new_full((len(targets), 1), -1.0))
