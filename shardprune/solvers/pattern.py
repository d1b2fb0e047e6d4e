"""Sparsity patterns: unstructured, N:M, and mixed:M.

A recipe's pattern is the whole model's; `at` returns the pattern of a projection with a given sparsity, which differs
between projections if N is mixed.

Recipes and shell completion do without torch: only functions on tensors import it.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_ROWS = 512  # rows of a weight in which its pattern is detected
BROKEN = 10.0  # a pattern must have at least so many groups that chance would have broken
FULL = 0.5  # of its groups with any nonzero, the least share that have N


@dataclass(frozen=True)
class Unstructured:
    """Zeros anywhere; their number is the projection's sparsity."""

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None

    def at(self, sparsity: float) -> "Unstructured":
        return self

    def mask(self, scores: "Tensor", sparsity: float, per_row: bool) -> "Tensor":
        """Return the mask of the smallest `scores` [rows, cols], True where pruned, within each row or over all."""
        from shardprune.solvers.selection import cumulative_counts, smallest, smallest_per_row

        rows, cols = scores.shape
        if per_row:
            return smallest_per_row(scores, cumulative_counts(rows, cols, sparsity))
        return smallest(scores, int(rows * cols * sparsity + 0.5))

    def zeros(self, rows: int, cols: int, sparsity: float) -> int:
        """Return the number of zeros of such a mask."""
        return int(rows * cols * sparsity + 0.5)

    def broken(self, weight: "Tensor") -> "Tensor":
        """Return the number of groups of a row with too many nonzeros, [] on the device: there are no groups."""
        return weight.new_zeros(())

    def holds(self, weight: "Tensor") -> bool:
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

    def mask(self, scores: "Tensor", sparsity: float, per_row: bool) -> "Tensor":
        """Return the mask of the smallest `scores` [rows, cols] of every group of a row, True where pruned."""
        from shardprune.solvers.selection import smallest_per_group

        return smallest_per_group(scores, self.n, self.m)

    def zeros(self, rows: int, cols: int, sparsity: float) -> int:
        """Return the number of zeros of such a mask."""
        groups, rest = divmod(cols, self.m)
        return rows * (groups * (self.m - self.n) + max(0, rest - self.n))

    def broken(self, weight: "Tensor") -> "Tensor":
        """Return the number of groups of `weight` [rows, cols] with more than `n` nonzeros, [] on the device."""
        rows, cols = weight.shape
        whole = cols // self.m * self.m
        full, rest = (weight != 0).split([whole, cols - whole], dim=1)
        return (full.reshape(rows, -1, self.m).sum(-1) > self.n).sum() + (rest.sum(-1) > self.n).sum()

    def holds(self, weight: "Tensor") -> bool:
        """Return whether `weight` [rows, cols] has at most `n` nonzeros in every group."""
        return int(self.broken(weight)) == 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


Pattern = Unstructured | NM


@dataclass(frozen=True)
class Mixed:
    """N:M with a common M; an allocation chooses N for every layer, from 1 to M."""

    m: int

    @property
    def sparsity(self) -> None:
        """The sparsity that the pattern fixes: none."""
        return None

    def at(self, sparsity: float) -> NM:
        """Return the pattern of a projection with this sparsity."""
        return NM(round(self.m * (1 - sparsity)), self.m)

    def __str__(self) -> str:
        return f"mixed:{self.m}"


def parse_pattern(text: str) -> Pattern | Mixed:
    """Parse `unstructured`, `N:M` with 0 < N < M, or `mixed:M` with M > 1.

    Raises:
        ValueError: the text is none of these.
    """
    if text == "unstructured":
        return Unstructured()
    match = re.fullmatch(r"(\d+|mixed):(\d+)", text)
    if match and match[1] == "mixed" and int(match[2]) > 1:
        return Mixed(int(match[2]))
    if match and match[1] != "mixed" and 0 < int(match[1]) < int(match[2]):
        return NM(int(match[1]), int(match[2]))
    raise ValueError("use 'unstructured', N:M with 0 < N < M such as 2:4, or mixed:M such as mixed:8")


def pattern_of(weight: "Tensor") -> Pattern:
    """Detect the pattern of the zeros of a pruned `weight` [rows, cols].

    It is the smallest N/M, among the M up to 32 that divide the inputs, such that no group of M has more than N
    nonzeros: in full N:M groups the share of nonzeros is that of the whole weight, and no other M can have a smaller
    N/M. Chance is excluded: as many nonzeros placed at random would break at least `BROKEN` groups. So are nonzeros
    that are spread more evenly than at random, as where few columns hold the large ones: of the groups with any nonzero
    at least `FULL` have N.
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
        if not 0 < n < m or (counts == n).sum() < FULL * (counts > 0).sum():
            continue
        if counts.numel() * _chance_of_more(n, m, density) >= BROKEN:
            found.append((n / m, m, n))
    for _, m, n in sorted(found):
        if NM(n, m).holds(weight):
            return NM(n, m)
    return Unstructured()


def _chance_of_more(n: int, m: int, density: float) -> float:
    """Return the probability that more than `n` of `m` independent weights are nonzero."""
    return sum(math.comb(m, k) * density**k * (1 - density) ** (m - k) for k in range(n + 1, m + 1))
