"""Where zeros may stand in a projection: anywhere, or N nonzeros in every M consecutive inputs.

What a recipe names holds for the whole model; `at` gives the pattern of a projection with a certain
sparsity, which differs between projections where N is mixed.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.selection import cumulative_counts, smallest, smallest_per_row

SAMPLE_ROWS = 512  # of a weight, in which the pattern of its zeros is looked for
BROKEN = 10.0  # groups that chance would break, where unbroken ones are taken for a pattern


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; how many is the projection's sparsity."""

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern itself fixes: none."""
        return None

    def at(self, sparsity: float) -> "Unstructured":
        return self

    def mask(self, scores: Tensor, sparsity: float, per_row: bool) -> Tensor:
        """True where `scores` [rows, cols] are pruned: the smallest, within each row or over all."""
        rows, cols = scores.shape
        if per_row:
            return smallest_per_row(scores, cumulative_counts(rows, cols, sparsity))
        return smallest(scores, int(rows * cols * sparsity + 0.5))

    def zeros(self, rows: int, cols: int, sparsity: float) -> int:
        """The number of zeros that a mask of this pattern has."""
        return int(rows * cols * sparsity + 0.5)

    def holds(self, weight: Tensor) -> bool:
        return True

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """At most `n` nonzeros in every `m` consecutive inputs of a row (2:4 is half, 2:8 three quarters).

    Where `m` does not divide the inputs, the last group of a row is shorter and keeps at most `n` too.
    """

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that the pattern fixes."""
        return 1 - self.n / self.m

    def at(self, sparsity: float) -> "NM":
        return self

    def mask(self, scores: Tensor, sparsity: float, per_row: bool) -> Tensor:
        """True where `scores` [rows, cols] are pruned: the smallest of every group of a row."""
        rows, cols = scores.shape
        whole = cols // self.m * self.m
        mask = torch.zeros_like(scores, dtype=torch.bool)
        if whole:
            groups = scores[:, :whole].reshape(rows, -1, self.m)
            mask[:, :whole] = _smallest_of_each(groups, self.m - self.n).reshape(rows, whole)
        if cols - whole > self.n:
            mask[:, whole:] = _smallest_of_each(scores[:, whole:], cols - whole - self.n)
        return mask

    def zeros(self, rows: int, cols: int, sparsity: float) -> int:
        """The number of zeros that a mask of this pattern has."""
        groups, rest = divmod(cols, self.m)
        return rows * (groups * (self.m - self.n) + max(0, rest - self.n))

    def holds(self, weight: Tensor) -> bool:
        """Whether `weight` [rows, cols] has at most `n` nonzeros in every group."""
        rows, cols = weight.shape
        padded = torch.nn.functional.pad((weight != 0).to(torch.int32), (0, -cols % self.m))
        return bool((padded.view(rows, -1, self.m).sum(-1) <= self.n).all())

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


@dataclass(frozen=True)
class Mixed:
    """N:M with a common M, whose N an allocation chooses for every layer from 1 to M."""

    m: int

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern itself fixes: none."""
        return None

    def at(self, sparsity: float) -> NM:
        """The pattern of a projection to which the allocation gave this sparsity."""
        return NM(round(self.m * (1 - sparsity)), self.m)

    def __str__(self) -> str:
        return f"mixed:{self.m}"


def _smallest_of_each(groups: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` smallest along the last dimension."""
    order = groups.sort(dim=-1, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def parse_pattern(text: str) -> Pattern | Mixed:
    """`unstructured`, `N:M` with 0 < N < M, or `mixed:M` with M > 1.

    Raises:
        ValueError: the text is neither.
    """
    if text == "unstructured":
        return Unstructured()
    match = re.fullmatch(r"(\d+|mixed):(\d+)", text)
    if match and match[1] == "mixed" and int(match[2]) > 1:
        return Mixed(int(match[2]))
    if match and match[1] != "mixed" and 0 < int(match[1]) < int(match[2]):
        return NM(int(match[1]), int(match[2]))
    raise ValueError("use 'unstructured', N:M with 0 < N < M such as 2:4, or mixed:M such as mixed:8")


def pattern_of(weight: Tensor) -> Pattern:
    """The pattern that the zeros of a pruned `weight` [rows, cols] show.

    Of the M up to 32 that divide the inputs, the one with the smallest N/M such that no group of M has more
    than N nonzeros: full groups of N:M have the share of nonzeros of the whole weight, and no other M can have
    less. It cannot be chance: the same number of nonzeros thrown anywhere would break `BROKEN` groups or more.
    """
    sample = weight[:SAMPLE_ROWS] != 0
    rows, cols = sample.shape
    density = float(sample.double().mean())
    found = []
    for m in range(2, 33):
        if cols % m:
            continue
        counts = sample.view(rows, -1, m).sum(-1)
        n = int(counts.max())
        if 0 < n < m and counts.numel() * _chance_of_more(n, m, density) >= BROKEN:
            found.append((n / m, m, n))
    for _, m, n in sorted(found):
        if NM(n, m).holds(weight):
            return NM(n, m)
    return Unstructured()


def _chance_of_more(n: int, m: int, density: float) -> float:
    """The chance that more than `n` of `m` independent weights are nonzero."""
    return sum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in range(n + 1, m + 1))
