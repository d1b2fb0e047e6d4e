"""Matrix products of solvers, in float32's accuracy.

On CUDA float32 products run on the ordinary cores, at an eighth of the rate that the tensor cores reach with TF32 (ten
bits of mantissa). Large products therefore go through the tensor cores as three products (3xTF32): with x = hi + lo,
hi being x rounded to TF32,

    x y = lo hi + hi lo + hi hi,   small terms first,

and what is missing, lo lo, is 2^-22 of the product. The small terms are one call, whose inner dimension is twice as
long.

The tensor cores cut their running sums instead of rounding them (Ootomo and Yokota, arXiv 2203.03341, section 3), so
that their error grows with the number of terms: on an H200, 2.3e-9 of the product a term. hi hi is therefore summed up
RUN terms at a time, each added to the target by the ordinary cores, which round; of the small terms a cut is 2^-11 of
that.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Splitting an operand touches 28 bytes an entry. With the rates of an H200 (float32 51 TFLOP/s, TF32 383 TFLOP/s, 4.2
# TB/s) it pays where
#     2 rows cols inner (1 / 51e12 - 3 / 383e12) > 28 inner (rows + cols) / 4.2e12,
# that is rows cols / (rows + cols) > 282, whatever the inner dimension. The bound leaves room for cards with less
# memory bandwidth and for the target, which is read and written once for each RUN; below the number of multiplications
# the launches would take longer than the product.
NARROW = 512
SMALL = 2**30  # multiplications

PIECE = 2**26  # entries of both operands that are split at once, 8 bytes for each
RUN = 256  # terms of a sum that the tensor cores add up on their own: an error of 6e-7, less than float32's on a GPU


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
    step = max(1, PIECE // (len(left) + right.shape[1]))
    for place, (first, second) in enumerate(zip(left.split(step, 1), right.split(step), strict=True)):
        lows_highs, highs_lows = halves(first, low=0), halves(second.t(), low=1).t()
        inner = first.shape[1]
        highs = lows_highs[:, inner:].split(RUN, 1), highs_lows[:inner].split(RUN)
        with _tf32():
            target.addmm_(lows_highs, highs_lows, alpha=alpha, beta=1.0 if place else beta)
            for run in zip(*highs, strict=True):
                target.addmm_(*run, alpha=alpha)
    return target


def split_bytes(entries: int) -> int:
    """Return the bytes that the halves of operands of so many entries in all take: of a piece at most."""
    return 8 * min(PIECE, entries)


def halves(matrix: Tensor, low: int) -> Tensor:
    """Return the two halves of a matrix [count, inner] beside one another, [count, 2 inner]: `low` is 0 where the rest
    comes first, or 1.

    Rows are contiguous, or columns where the matrix has contiguous columns.
    """
    count, inner = matrix.shape
    if matrix.stride(0) == 1:
        stacked = torch.empty(2, inner, count, dtype=matrix.dtype, device=matrix.device)
        places, terms = [part.t() for part in stacked], stacked.flatten(0, 1).t()
    else:
        stacked = torch.empty(count, 2, inner, dtype=matrix.dtype, device=matrix.device)
        places, terms = list(stacked.unbind(1)), stacked.flatten(1)
    split(matrix, places[1 - low], places[low])
    return terms


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
