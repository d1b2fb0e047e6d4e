"""The losses of a training run: next-token cross entropy, and divergence from a teacher."""

import torch
from torch import Tensor, nn

from shardprune.recovery.rows import IGNORED


def hard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the summed cross entropy of the labelled tokens.

    Args:
        logits: [batch, length, vocabulary], of any dtype; the loss is computed in float32.
        labels: [batch, length], the tokens themselves, or IGNORED.
    """
    counted = labels[:, 1:] != IGNORED
    return nn.functional.cross_entropy(_counted(logits, counted), labels[:, 1:][counted], reduction="sum")


def soft_loss(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Compute the summed divergence T^2 KL(teacher || student) of the labelled predictions at temperature T.

    The factor T^2 keeps gradients of the size of the hard loss's (arXiv 1503.02531, section 2). Shapes as in
    `hard_loss`.
    """
    counted = labels[:, 1:] != IGNORED
    student = torch.log_softmax(_counted(logits, counted) / temperature, dim=-1)
    wanted = torch.log_softmax(_counted(teacher, counted) / temperature, dim=-1)
    return temperature**2 * nn.functional.kl_div(student, wanted, reduction="sum", log_target=True)


def _counted(logits: Tensor, counted: Tensor) -> Tensor:
    """Return the float32 logits [tokens, vocabulary] of the labelled predictions; all of them would take gigabytes."""
    return logits[:, :-1][counted].float()
