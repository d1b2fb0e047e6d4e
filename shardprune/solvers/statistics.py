"""Statistics of a projection's input: sums over the calibration tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shardprune.solvers.factor import Factor, factorise

Kind = Literal["gram", "squares"]


@dataclass
class InputStatistics:
    """Sums over the tokens of one input X [tokens, cols], shared by the projections that read it.

    `sums` is X^T X, float32 [cols, cols] (kind `gram`), or its diagonal alone, float32 [cols]
    (kind `squares`); `samples` is the number N of sequences behind it. Sums of replicas add up.
    """

    kind: Kind
    sums: Tensor
    samples: int = 0
    _factors: dict[float, Factor] = field(default_factory=dict, repr=False)

    @classmethod
    def empty(cls, kind: Kind, cols: int, device: torch.device | str = "cpu") -> "InputStatistics":
        shape = (cols, cols) if kind == "gram" else (cols,)
        return cls(kind, torch.zeros(shape, dtype=torch.float32, device=device))

    def add(self, inputs: Tensor, samples: int) -> None:
        """Add the inputs of one wave of `samples` sequences, [..., cols] in any floating dtype.

        The number of sequences cannot be read off the shape: some models flatten it into the tokens.
        """
        self.samples += samples
        tokens = inputs.reshape(-1, inputs.shape[-1])
        if self.kind == "squares":
            self.sums += tokens.float().square().sum(0)
        else:
            add_gram(self.sums, tokens)

    def merge(self, sums: Tensor, samples: int) -> None:
        """Add the sums of a replica."""
        self.sums += sums.to(self.sums.device)
        self.samples += samples

    @property
    def mean_squares(self) -> Tensor:
        """s = 1/N sum over tokens of x^2, float32 [cols]."""
        return (self.sums.diagonal() if self.kind == "gram" else self.sums) / self.samples

    @property
    def finite(self) -> bool:
        """Whether all sums are; no entry of X^T X is larger than the largest of its diagonal."""
        return bool(torch.isfinite(self.mean_squares).all())

    @property
    def hessian(self) -> Tensor:
        """H = 2/N X^T X, float32 [cols, cols]."""
        return self.sums * (2 / self.samples)

    def factor(self, damping: float) -> Factor:
        """Return the upper factor of the inverse Hessian, computed once for all projections that read this input."""
        if damping not in self._factors:
            self._factors[damping] = factorise(self.hessian, damping)
        return self._factors[damping]


def add_gram(gram: Tensor, tokens: Tensor) -> None:
    """gram [cols, cols] += tokens^T tokens in float32, for tokens [count, cols].

    On CUDA half-precision tokens go through the tensor cores and leave them as float32 sums: a product
    of two 16-bit numbers is exact there, so nothing is lost against float32 arithmetic. The CPU has no
    such product and widens first.
    """
    if tokens.is_cuda and tokens.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(gram, tokens.t(), tokens, out_dtype=torch.float32, out=gram)
    else:
        wide = tokens.float()
        gram.addmm_(wide.t(), wide)


def output_error(dense: Tensor, pruned: Tensor, statistics: InputStatistics) -> float:
    """Return the relative output error ||XW - XW'||^2 / ||XW||^2 of a projection, from X^T X.

    Args:
        dense, pruned: weights [rows, cols], float32.
    """
    gram = statistics.sums
    change = dense - pruned
    norm = ((dense @ gram) * dense).sum(dtype=torch.float64)
    lost = ((change @ gram) * change).sum(dtype=torch.float64)
    return float(lost / norm) if norm > 0 else 0.0


Sums = tuple[Tensor, int]  # sums over some sequences' inputs, and the number of sequences


def merged(own: InputStatistics, parts: Sequence[Sums | None]) -> InputStatistics:
    """Return the sums over all replicas, in their order; `parts` is empty for a single one, and None in the worker's
    place.
    """
    if not parts:
        return own
    total = InputStatistics(own.kind, torch.zeros_like(own.sums))
    for part in parts:
        total.merge(*(part or (own.sums, own.samples)))
    return total
