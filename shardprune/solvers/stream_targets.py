"""Targets in the dense residual stream: weights that make up, before zeros are chosen, for what is lost already.

A layer of a pruned model sees activations X that differ from the dense model's. Its projections therefore aim elsewhere
than at X W^T, in closed form (GPTAQ, arXiv 2504.02692; LoaQ, arXiv 2509.06297), with H = X^T X and a ridge r:

    an output projection, at the dense residual stream:     W* = W + E^T X (H + r)^-1,        E = dense - sparse stream
    any other, half way at its output on dense inputs X_d:  W* = W + 1/2 W E^T X (H + r)^-1,  E = X_d - X

where the sparse stream is that behind the projection while it still has its dense weights. Where a norm stands between
an output projection and the stream, it aims half way at its own dense output: E is that output minus the present one,
and W* = W + 1/2 E^T X (H + r)^-1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.products import add_product, product
from shardprune.solvers.statistics import InputStatistics, Summed
from shardprune.solvers.triangles import times_upper, times_upper_transposed

RIDGE = 0.01  # r, as a fraction of the mean diagonal of H
HALF_WAY = 0.5


@dataclass
class Differences(Summed):
    """Sums over the tokens of E^T X for one input X [tokens, cols] and differences E [tokens, count].

    `sums` is float32 [count, cols], `samples` the number of sequences behind it.
    """

    sums: Tensor
    samples: int = 0

    @classmethod
    def empty(cls, count: int, cols: int, device: torch.device | str = "cpu") -> "Differences":
        return cls(torch.zeros(count, cols, dtype=torch.float32, device=device))

    def tensors(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def add(self, differences: Tensor, inputs: Tensor, samples: int) -> None:
        """Add those of one wave of `samples` sequences: [..., count] and [..., cols], in one floating dtype."""
        self.samples += samples
        tokens = inputs.reshape(-1, inputs.shape[-1])
        add_product(self.sums, differences.reshape(len(tokens), -1).t(), tokens)


def aimed(weight: Tensor, statistics: InputStatistics, differences: Differences, of_inputs: bool, way: float) -> Tensor:
    """Return the weight W* that comes nearest to the target of a projection, float32 [rows, cols].

    Args:
        weight: W [rows, cols], dense; stays as it is.
        statistics: of the input X, kind `gram`.
        differences: E^T X.
        of_inputs: E are differences of inputs, [tokens, cols], not of outputs, [tokens, rows].
        way: the fraction of the way to the target.

    Raises:
        SolverError: the Hessian cannot be factorised.
    """
    factor = statistics.factor(RIDGE)
    missed = product(weight.float(), differences.sums) if of_inputs else differences.sums
    # H^-1 = U^T U, and U is its diagonal times the steps.
    change = times_upper_transposed(missed, factor.steps).mul_(factor.diagonal.square() * (way * statistics.scale))
    corrected = torch.empty_like(change)
    times_upper(change, factor.steps, into=corrected)
    return corrected.add_(weight)
