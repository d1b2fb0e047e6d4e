"""Products of symmetric and triangular matrices by panels: nothing is multiplied that is known, or known to be zero.

A symmetric matrix is given by its lower triangle; what lies above it may be anything.
"""

from functools import cache

import torch
from torch import Tensor

from shardprune.solvers.products import add_product, product

PANELS = 8  # at most: they leave 9/16 of the operations of a whole product, 16 would leave 17/32
# Columns of a panel are a multiple of this: a processor's products are slow at odd sizes, a GPU's at small ones too
# (`products.in_three`).
GRAIN, CUDA_GRAIN = 64, 1024


def panels(size: int, device: torch.device) -> list[slice]:
    """Return at most PANELS ranges of equal width, except for the last, over `size` columns."""
    grain = CUDA_GRAIN if device.type == "cuda" else GRAIN
    width = -(-size // (PANELS * grain)) * grain
    return [slice(left, min(left + width, size)) for left in range(0, size, width)]


def lower_panels(matrix: Tensor) -> list[Tensor]:
    """Return views of a square matrix that together hold its lower triangle once: panels from the diagonal down."""
    return [matrix[panel.start :, panel] for panel in panels(len(matrix), matrix.device)]


@cache  # plans of mixtures ask for the same few sizes millions of times
def lower_entries(size: int) -> int:
    """Return the number of entries of the `lower_panels` of a square matrix on CUDA; on a CPU there are no more."""
    return sum((size - panel.start) * (panel.stop - panel.start) for panel in panels(size, torch.device("cuda")))


def whole(symmetric: Tensor) -> Tensor:
    """Return a symmetric matrix with both triangles."""
    lower = symmetric.tril()
    return lower + lower.tril(-1).t()


def mirror(matrix: Tensor) -> Tensor:
    """Fill in what lies above the diagonal of a symmetric matrix, in place; return it."""
    for panel in panels(len(matrix), matrix.device):
        matrix[panel, panel] = whole(matrix[panel, panel])
        matrix[panel, panel.stop :] = matrix[panel.stop :, panel].t()
    return matrix


def add_square(symmetric: Tensor, factor: Tensor, alpha: float = 1.0) -> None:
    """symmetric [n, n] += alpha * factor [n, inner] @ factor^T, in place, its lower triangle alone."""
    for panel in panels(len(symmetric), symmetric.device):
        add_product(symmetric[panel.start :, panel], factor[panel.start :], factor[panel].t(), alpha)


def times_upper(left: Tensor, upper: Tensor, into: Tensor) -> None:
    """into [rows, n] = left [rows, n] @ upper [n, n]."""
    for panel in panels(len(upper), upper.device):
        add_product(into[:, panel], left[:, : panel.stop], upper[: panel.stop, panel], beta=0)


def times_upper_transposed(left: Tensor, upper: Tensor) -> Tensor:
    """Return left [rows, n] @ upper^T, for an upper triangular matrix [n, n]."""
    result = torch.empty(left.shape, dtype=left.dtype, device=left.device)
    for panel in panels(len(upper), upper.device):
        add_product(result[:, panel], left[:, panel.start :], upper[panel, panel.start :].t(), beta=0)
    return result


def upper_times(upper: Tensor, right: Tensor, alpha: float = 1.0) -> None:
    """right [n, cols] = alpha * upper [n, n] @ right, in place."""
    for panel in panels(len(upper), upper.device):  # rows above need none of the old values
        old = right[panel.start :]
        right[panel] = product(upper[panel, panel.start :], old).mul_(alpha)
