"""Error curves: the rise of the loss with the sparsity of one projection, by its inputs and by the loss's curvature.

Where a projection of outputs Z = X W^T changes by E, the loss rises by about 1/2 tr(G E H E^T) a token (K-FAC, Martens
and Grosse, arXiv 1503.05671): H is the second moment of its inputs, G that of the gradients dL/dZ for labels that the
model draws itself, of which the diagonal is taken. E is the change that SparseGPT makes to some of the rows.

Of the expert of a mixture, both are those of the tokens that are routed to it, and so is the rise. What a few tokens
say of it is little: `with_prior` adds what some more would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.allocation.budget import HIGHEST
from shardprune.solvers.allocation.knapsack import Curve
from shardprune.solvers.methods import Target
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.sparsegpt import prune_together
from shardprune.solvers.statistics import PRIOR_TOKENS, InputStatistics, Summed, gram_norm

TOKENS = 2**14  # of calibration text that curves are measured on, at the least, where there are so many
ROWS = 4  # of which one is solved
SPAN = 0.2  # of the levels on either side of the target
LEVELS = 5
LABEL_SEED = 2**32  # beyond the seeds by which text is drawn: labels do not repeat a text that the model has written


def windows_of(samples: int, seqlen: int) -> int:
    """Return how many of so many calibration windows error curves are measured on."""
    return min(samples, math.ceil(TOKENS / seqlen))


def levels_around(target: float) -> list[float]:
    """Return the five sparsities at which errors are measured, ascending, with the target as the third.

    They reach 0.2 to either side, but not below half the target nor above `HIGHEST`.
    """
    low, high = max(target - SPAN, target / 2), min(target + SPAN, HIGHEST)
    return [round(level, 6) for level in (low, (low + target) / 2, target, (target + high) / 2, high)]


@dataclass
class RowGradients(Summed):
    """Sums over tokens of the squared gradients dL/dZ at the rows of the projections that read one input.

    `rows` has float32 [rows] by projection; `samples` is the number of sequences behind them.
    """

    rows: dict[str, Tensor]
    samples: int = 0

    @classmethod
    def empty(cls, rows: Mapping[str, int], device: torch.device | str = "cpu") -> "RowGradients":
        return cls({name: torch.zeros(count, device=device) for name, count in rows.items()})

    def add(self, name: str, gradients: Tensor, scale: float = 1.0) -> None:
        """Add the gradients [..., rows] of a wave at a projection's outputs, in any floating dtype, times `scale`."""
        self.rows[name] += (gradients.float() * scale).square_().flatten(0, -2).sum(0)

    def tensors(self) -> dict[str, Tensor]:
        return self.rows

    @property
    def finite(self) -> bool:
        """Whether all sums are."""
        return all(bool(torch.isfinite(rows).all()) for rows in self.rows.values())


def error_curves(
    weights: Mapping[str, Tensor],
    inputs: InputStatistics,
    gradients: RowGradients,
    levels: Sequence[float],
    damping: float,
    tokens: int,
    seen: int,
) -> dict[str, Curve]:
    """Return the estimated rise of the loss, in nats a token, at each level of sparsity of each projection that reads
    one input.

    Args:
        weights: dense, [rows, cols] by name; every fourth row is solved and stands for four.
        inputs: of kind `gram`.
        damping: of the Gram matrix, fraction of its mean diagonal.
        tokens: of the text.
        seen: those of them that are behind the sums over the inputs.

    Raises:
        SolverError: the Hessian cannot be factorised.
    """
    some = {name: weight[::ROWS].float() for name, weight in weights.items()}
    roots = {name: gradients.rows[name][::ROWS].sqrt().unsqueeze(1) for name in weights}
    errors: dict[str, list[Tensor]] = {name: [] for name in weights}
    for level in levels:
        solutions = prune_together([Target(own, Unstructured(), level, damping) for own in some.values()], inputs)
        for (name, own), solution in zip(some.items(), solutions, strict=True):
            errors[name].append(gram_norm((own - solution.weight).mul_(roots[name]), inputs.sums))
    found: dict[str, Curve] = {}
    for name, weight in weights.items():
        scale = len(weight) / len(some[name]) / (2 * tokens * max(1, seen))
        found[name] = tuple(
            (level, error * scale) for level, error in zip(levels, torch.stack(errors[name]).tolist(), strict=True)
        )
    return found


def with_prior(curves: Mapping[str, Curve], tokens: float) -> dict[str, Curve]:
    """Return the curves of one part of all experts of a mixture, to each of which as many tokens are added as have a
    part in the sums over its inputs (`PRIOR_TOKENS`), with the mean error of a token at all of them.

    An expert that saw no token would cost nothing else, and give up all that it can.

    Args:
        curves: by the name of the projection, all at the same levels.
        tokens: that an expert saw on average.
    """
    share = PRIOR_TOKENS / (tokens * len(curves))
    added = [share * math.fsum(error for _, error in points) for points in zip(*curves.values(), strict=True)]
    return {
        name: tuple((level, error + more) for (level, error), more in zip(curve, added, strict=True))
        for name, curve in curves.items()
    }
