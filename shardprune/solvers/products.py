"""Matrix products of solvers, in float32's accuracy.

On CUDA float32 products run on the ordinary cores, at an eighth of the rate that the tensor cores reach with TF32 (ten
bits of mantissa). Large products therefore go through the tensor cores as three products (3xTF32): with x = hi + lo,
hi being x rounded to TF32,

    x y = lo hi + hi lo + hi hi,   small terms first,

and what is missing, lo lo, is 2^-22 of the product.

The tensor cores cut their running sums instead of rounding them (Ootomo and Yokota, arXiv 2203.03341, section 3), so
that their error grows with the number of terms: on an H200, 2.4e-9 of the product a term. hi hi is therefore summed up
RUN terms at a time, each added to the target by the ordinary cores, which round. The small terms, where a cut is 2^-11
of that, are one call, whose inner dimension is twice as long; a short product is one call of all three terms.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Splitting an operand touches 28 bytes an entry. With the rates of an H200 (float32 51 TFLOP/s, TF32 405 TFLOP/s, 4.2
# TB/s) it pays where
#     2 rows cols inner (1 / 51e12 - 3 / 405e12) > 28 inner (rows + cols) / 4.2e12,
# that is rows cols / (rows + cols) > 272, whatever the inner dimension. The bound leaves room for cards with less
# memory bandwidth and for the target, which is read and written once for each run; below the number of multiplications
# the launches would take longer than the product.
NARROW = 512
SMALL = 2**30  # multiplications

PIECE = 2**26  # entries of both operands that are split at once, 8 bytes for each
# Terms of a sum that the tensor cores add up on their own. An H200, product of 8,192^3: 95 TFLOP/s with an error of
# 1.2e-6 (256: 81, 6e-7; 1,024: 99, 2.4e-6; float32's own: 51, 1.6e-6).
RUN = 512


def add_product(target: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """target [rows, cols] = beta * target + alpha * left [rows, inner] @ right [inner, cols], in place.

    The target is float32, a view of any strides, and may be uninitialised with `beta` 0. Factors are float32, or of 16
    bits: two such numbers have an exact product in float32, which the tensor cores add up as float32. A CPU has no such
    product and widens them. Returns the target.
    """
    if left.dtype != target.dtype:
        if target.is_cuda:
            return torch.addmm(target, left, right, out_dtype=target.dtype, alpha=alpha, beta=beta, out=target)
        left, right = left.to(target.dtype), right.to(target.dtype)
    rows, inner = left.shape
    cols = right.shape[1]
    if target.is_cuda and in_three(rows, cols, inner) and _has_fast_tf32(target.device):
        return add_split_product(target, left, right, alpha, beta)
    return target.addmm_(left, right, alpha=alpha, beta=beta)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left [rows, inner] @ right [inner, cols], for float32 views of any strides."""
    target = torch.empty(len(left), right.shape[1], dtype=left.dtype, device=left.device)
    return add_product(target, left, right, beta=0)


def in_three(rows: int, cols: int, inner: int) -> bool:
    """Whether a product [rows, inner] @ [inner, cols] is large enough for 3xTF32 to be faster."""
    return rows * cols > NARROW * (rows + cols) and rows * cols * inner >= SMALL


def add_split_product(target: Tensor, left: Tensor, right: Tensor, alpha: float, beta: float) -> Tensor:
    """`add_product` by 3xTF32, for entries that are finite.

    The inner dimension is taken piece by piece: memory beyond the arguments is `split_bytes` of their entries.
    """
    short = 3 * left.shape[1] <= RUN
    # Whole runs: rows of an odd length would not be aligned, and such operands take slower kernels.
    step = max(RUN, PIECE // (len(left) + right.shape[1]) // RUN * RUN)
    for place, (first, second) in enumerate(zip(left.split(step, 1), right.split(step), strict=True)):
        lefts = terms(first, "lhh" if short else "lh")
        rights = terms(second.t(), "hlh" if short else "hl").t()
        with _tf32():
            target.addmm_(lefts, rights, alpha=alpha, beta=1.0 if place else beta)
            if not short:
                inner = first.shape[1]
                for run in zip(lefts[:, inner:].split(RUN, 1), rights[:inner].split(RUN), strict=True):
                    target.addmm_(*run, alpha=alpha)
    return target


def split_bytes(entries: int) -> int:
    """Return the bytes that the halves of operands of so many entries in all take: of a piece at most, or of a run."""
    return 8 * min(PIECE, entries)


def terms(matrix: Tensor, order: str) -> Tensor:
    """Return the high and low halves of a matrix [count, inner] beside one another, [count, len(order) * inner]: at
    each place that of its letter, h or l.

    Rows are contiguous, or columns where the matrix has contiguous columns.
    """
    count, inner = matrix.shape
    if matrix.stride(0) == 1:
        stacked = torch.empty(len(order), inner, count, dtype=matrix.dtype, device=matrix.device)
        places, beside = [part.t() for part in stacked], stacked.flatten(0, 1).t()
    else:
        stacked = torch.empty(count, len(order), inner, dtype=matrix.dtype, device=matrix.device)
        places, beside = list(stacked.unbind(1)), stacked.flatten(1)
    high, low = order.index("h"), order.index("l")
    split(matrix, places[high], places[low])
    for place in range(max(high, low) + 1, len(order)):
        places[place].copy_(places[high if order[place] == "h" else low])
    return beside


def split(values: Tensor, high: Tensor, low: Tensor) -> None:
    """Fill `high` with float32 `values`, rounded to the 10 bits of TF32's mantissa, and `low` with the rest.

    Rounding to the nearest halves the rest, and gives it either sign: cut values would leave a rest of their own sign,
    whose own cut by the tensor cores would add up.
    """
    bits = high.view(torch.int32)
    torch.add(values.view(torch.int32), 0x1000, out=bits)  # half of the last place kept; ties go away from zero
    bits.bitwise_and_(~0x1FFF)
    torch.sub(values, high, out=low)


@functools.cache
def _has_fast_tf32(device: torch.device) -> bool:
    """Whether TF32 is more than three times as fast as float32: on A100, H100, H200 and B200 (compute capability 8.0,
    9.0, 10.0, 10.3), not on the cards of the same generations for graphics and inference, and on none of AMD's.
    """
    return torch.version.hip is None and torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3))


@contextmanager
def _tf32() -> Iterator[None]:
    """Products of float32 by TF32; everywhere else they stay float32's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
