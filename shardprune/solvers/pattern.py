"""Where zeros may stand in a projection: anywhere, or N nonzeros in every M consecutive inputs."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.selection import cumulative_counts, smallest, smallest_per_row


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; how many is the projection's sparsity."""

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern itself fixes: none."""
        return None

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


def _smallest_of_each(groups: Tensor, count: int) -> Tensor:
    """Boolean mask of the `count` smallest along the last dimension."""
    order = groups.sort(dim=-1, stable=True).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def parse_pattern(text: str) -> Pattern:
    """`unstructured` or `N:M` with 0 < N < M.

    Raises:
        ValueError: the text is neither.
    """
    if text == "unstructured":
        return Unstructured()
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError("use 'unstructured' or N:M with 0 < N < M, such as 2:4")
    return NM(int(match[1]), int(match[2]))
