"""Divergence of a student's predictions from a teacher's: from its logits, or from the largest of its predictions.

The largest K predictions of a teacher and the mass of all others are a distribution over K + 1 outcomes. The student's
predictions are put together in the same way; the divergence of the two is never more than that of the whole
distributions, and is nothing where both agree.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from shardprune.model.head_logits import HeadLogits

CHUNK = 1024  # predictions whose logits are in float32 at a time
STORED = torch.float16  # of log-probabilities: their error is below that of logits in bfloat16
TOKENS = torch.int32


class Distillation(Protocol):
    """A teacher's part in the loss: `weight` of it is divergence from the teacher's predictions."""

    @property
    def weight(self) -> float: ...

    def part(self, chosen: slice) -> "Distillation":
        """Return the same of some of the predictions."""
        ...

    def divergence(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed divergence T^2 KL(teacher || student) at temperature T, and its gradient for the student's
        logits, both in float32.

        The factor T^2 keeps gradients of the size of the cross entropy's (arXiv 1503.02531, section 2).

        Args:
            logits: the student's [predictions, vocabulary], of any dtype, as the student has them.
        """
        ...


@dataclass(frozen=True, eq=False)
class WholeDistillation:
    """Distillation from all logits of a teacher.

    Attributes:
        outputs: of the teacher's head [predictions, vocabulary], of any dtype.
        made: what the teacher makes of them.
    """

    outputs: Tensor
    made: HeadLogits
    temperature: float
    weight: float

    def part(self, chosen: slice) -> "WholeDistillation":
        return replace(self, outputs=self.outputs[chosen])

    def divergence(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        temperature = self.temperature
        given = torch.log_softmax(logits.float() / temperature, dim=1)
        distilled = torch.log_softmax(self.made.of(self.outputs).float() / temperature, dim=1)
        loss = temperature**2 * nn.functional.kl_div(given, distilled, reduction="sum", log_target=True)
        return loss, given.exp_().sub_(distilled.exp_()).mul_(temperature)


@dataclass(frozen=True, eq=False)
class TopDistillation:
    """Distillation from the K largest predictions of a teacher, and the mass of all others.

    Attributes:
        tokens: [predictions, K], from `largest`.
        chances: [predictions, K + 1], likewise, at the same temperature.
    """

    tokens: Tensor
    chances: Tensor
    temperature: float
    weight: float

    def part(self, chosen: slice) -> "TopDistillation":
        return replace(self, tokens=self.tokens[chosen], chances=self.chances[chosen])

    def divergence(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        temperature = self.temperature
        wanted = torch.log_softmax(self.chances.float(), dim=1)  # rounded ones do not add up to 1
        given, rest = put_together(logits.float() / temperature, self.tokens.long())
        loss = temperature**2 * nn.functional.kl_div(given, wanted, reduction="sum", log_target=True)
        surplus = given.exp_().sub_(wanted.exp_())
        # What the others have too much is shared out among them as their own mass is.
        gradient = torch.softmax(rest, dim=1).mul_(surplus[:, -1:])
        return loss, gradient.scatter_(1, self.tokens.long(), surplus[:, :-1]).mul_(temperature)


def largest(outputs: Tensor, made: HeadLogits, temperature: float, top: int) -> tuple[Tensor, Tensor]:
    """Return a teacher's largest predictions.

    Args:
        outputs: of the teacher's head [predictions, vocabulary], of any dtype.
        made: what the teacher makes of them.
        top: K, less than the vocabulary.

    Returns:
        Tokens int32 [predictions, K], and log-probabilities at the temperature float16 [predictions, K + 1]; the last
        one is that of all other tokens together.
    """
    all_tokens = torch.empty(len(outputs), top, dtype=TOKENS, device=outputs.device)
    all_chances = torch.empty(len(outputs), top + 1, dtype=STORED, device=outputs.device)
    for start in range(0, len(outputs), CHUNK):
        part = slice(start, start + CHUNK)
        scaled = made.of(outputs[part]).float() / temperature
        tokens = scaled.topk(top, dim=1).indices
        chances, _ = put_together(scaled, tokens)
        all_tokens[part] = tokens
        all_chances[part] = chances.clamp_(min=torch.finfo(STORED).min)
    return all_tokens, all_chances


def put_together(scaled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of some tokens, and last of all others together: [predictions, K + 1].

    Args:
        scaled: logits float32 [predictions, vocabulary], which are overwritten.
        tokens: int64 [predictions, K].

    Returns:
        Beside them the logits of the others: `scaled`, with minus infinity in the places of the tokens.
    """
    whole = scaled.logsumexp(1, keepdim=True)
    apart = scaled.gather(1, tokens)
    rest = scaled.scatter_(1, tokens, -torch.inf)
    return torch.cat([apart, rest.logsumexp(1, keepdim=True)], dim=1).sub_(whole), rest
