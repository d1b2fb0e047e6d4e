"""Log-likelihoods of continuations, from the logits of the positions that predict them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LogLikelihood = tuple[float, bool]  # of a continuation, and whether each of its tokens is the likeliest one


@dataclass(frozen=True)
class Targets:
    """Continuations of a sequence of `length` tokens: each begins inside the sequence and ends one token after it, so
    that the sequence's last tokens predict it."""

    length: int
    continuations: tuple[tuple[int, ...], ...]

    @property
    def predicting(self) -> slice:
        """The positions that predict the longest continuation."""
        return slice(self.length - max(map(len, self.continuations)), self.length)


def runs_of(targets: Sequence[Targets], positions: int) -> Iterator[range]:
    """Yield contiguous runs of sequences with at most so many predicting positions, or of one sequence."""
    start = count = 0
    for place, target in enumerate(targets):
        own = target.predicting.stop - target.predicting.start
        if place > start and count + own > positions:
            yield range(start, place)
            start, count = place, 0
        count += own
    yield range(start, len(targets))


def scores_of(logs: Tensor, targets: Targets) -> list[LogLikelihood]:
    """Return the score of every continuation, from log-probabilities [positions, vocabulary] at the predicting
    positions."""
    likeliest = logs.argmax(-1)
    scores = []
    for continuation in targets.continuations:
        tokens, count = torch.tensor(continuation, device=logs.device), len(continuation)
        total = logs[-count:].gather(1, tokens.unsqueeze(1)).sum()
        scores.append((float(total), bool((likeliest[-count:] == tokens).all())))
    return scores


def perplexity_of(loss: float) -> float:
    """Return the perplexity of a mean loss in nats a token; infinity where a float holds no number as large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
