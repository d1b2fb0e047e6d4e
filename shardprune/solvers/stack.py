"""The stack of the projections that read one input: their columns side by side, swept as one weight.

A column's correction is the same product whatever projection a row belongs to. Zeros are chosen for each projection by
itself. The weights are kept transposed, [cols, rows], so that a column is contiguous.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.solvers.methods import Target
from shardprune.solvers.pattern import NM, Pattern
from shardprune.solvers.selection import cumulative_count

BLOCK = 128  # columns whose zeros are chosen together where the pattern is unstructured


@dataclass(frozen=True)
class Stack:
    """Projections of one pattern, pruned in place.

    Attributes:
        columns: float32 [cols, rows of all projections].
        mask: bool [cols, rows], True where pruned; filled by the sweep.
        squares: float64 [rows]: sum over columns of (lost / u_jj)^2, by which dW H dW^T is known.
        spans: rows of each projection.
        sparsities: fraction of zeros of each.
    """

    columns: Tensor
    mask: Tensor
    squares: Tensor
    spans: tuple[slice, ...]
    sparsities: tuple[float, ...]
    pattern: Pattern

    @classmethod
    def of(cls, targets: Sequence[Target], dead: Tensor) -> "Stack":
        """Return the stack of projections of one pattern, with zeros at inputs that are always zero.

        Args:
            dead: bool [cols].
        """
        weights, spans, rows = [target.weight for target in targets], [], 0
        for weight in weights:
            spans.append(slice(rows, rows + len(weight)))
            rows += len(weight)
        columns = torch.empty(weights[0].shape[1], rows, device=dead.device)
        for weight, span in zip(weights, spans, strict=True):
            columns[:, span] = weight.t()
        columns[dead] = 0
        return cls(
            columns,
            torch.empty_like(columns, dtype=torch.bool),
            torch.zeros(rows, dtype=torch.float64, device=dead.device),
            tuple(spans),
            tuple(target.sparsity for target in targets),
            targets[0].pattern,
        )

    @property
    def unit(self) -> int:
        """Number of columns whose zeros are chosen together: a group of N:M, or a block."""
        return self.pattern.m if isinstance(self.pattern, NM) else BLOCK

    @property
    def block(self) -> int:
        """Number of columns that correct all those to their right in one product: whole units."""
        return max(1, BLOCK // self.unit) * self.unit

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """The first column of each block, and that behind its last."""
        cols = len(self.columns)
        return [(left, min(left + self.block, cols)) for left in range(0, cols, self.block)]

    def counts(self, left: int, right: int) -> list[int]:
        """Return the number of zeros of each projection in the columns [left, right) of an unstructured pattern."""
        rows = [span.stop - span.start for span in self.spans]
        return [
            cumulative_count(right * each, sparsity) - cumulative_count(left * each, sparsity)
            for each, sparsity in zip(rows, self.sparsities, strict=True)
        ]
