"""Masked low-rank updates as Triton kernels: a weight and its update, and the gradients of the update's factors.

Both touch memory once: a tile of the product of B and A exists in registers alone, where the weight's zeros mask it.
The products with inputs and gradients stay cuBLAS's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS, WARPS = 128, 64, 8  # of a tile
STRIP = 512  # columns over which a program sums up what the rows of B get
RANKS, WIDE_RANKS = 64, 32  # of the rank at a time, in 16 and in 32 bits: more need more registers than there are
STAGES = 1  # of the loop over the rank, which is short


@triton.jit
def masked_sum_tile(
    weight,  # [rows, cols], its columns beside one another as those of all matrices here
    a,  # [rank, cols]
    b,  # [rows, rank]
    result,  # [rows, cols]
    rows,
    cols,
    rank,
    weight_stride,
    a_stride,
    b_stride,
    scale,
    WHOLE: tl.constexpr,  # weight and update, not the update alone
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    far = r.to(tl.int64)
    inside = (r[:, None] < rows) & (c[None, :] < cols)
    dense = tl.load(weight + far[:, None] * weight_stride + c[None, :], mask=inside, other=0.0).to(tl.float32)
    update = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, rank, RANKS):
        k = first + tl.arange(0, RANKS)
        left = tl.load(
            b + far[:, None] * b_stride + k[None, :], mask=(r[:, None] < rows) & (k[None, :] < rank), other=0.0
        )
        right = tl.load(
            a + k[:, None] * a_stride + c[None, :], mask=(k[:, None] < rank) & (c[None, :] < cols), other=0.0
        )
        update = tl.dot(left, right, update, input_precision="ieee")
    update = update * scale
    if WHOLE:
        update += dense
    update = tl.where(dense == 0, 0.0, update)
    tl.store(result + far[:, None] * cols + c[None, :], update.to(result.dtype.element_ty), mask=inside)


@triton.jit
def factor_gradients_tile(
    gradient,  # [rows, cols], of the update, not masked
    weight,  # [rows, cols]
    a,  # [rank, cols]
    b,  # [rows, rank]
    to_a,  # float32 [programs over rows, rank, cols]: what the rows of each program give
    to_b,  # float32 [strips, rows, rank]: what the columns of each strip give
    rows,
    cols,
    rank,
    gradient_stride,
    weight_stride,
    a_stride,
    b_stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STRIP: tl.constexpr,
    RANKS: tl.constexpr,
):
    tile, strip = tl.program_id(0), tl.program_id(1)
    r = tile * ROWS + tl.arange(0, ROWS)
    far = r.to(tl.int64)
    k = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    of_b = (r[:, None] < rows) & (k[None, :] < rank)
    left = tl.load(b + far[:, None] * b_stride + k[None, :], mask=of_b, other=0.0)
    summed = tl.zeros([ROWS, RANKS], dtype=tl.float32)
    for start in range(strip * STRIP, tl.minimum(strip * STRIP + STRIP, cols), COLS):
        c = start + tl.arange(0, COLS)
        inside = (r[:, None] < rows) & (c[None, :] < cols)
        of_a = (k[:, None] < rank) & (c[None, :] < cols)
        dense = tl.load(weight + far[:, None] * weight_stride + c[None, :], mask=inside, other=0.0)
        masked = tl.load(gradient + far[:, None] * gradient_stride + c[None, :], mask=inside & (dense != 0), other=0.0)
        right = tl.load(a + k[:, None] * a_stride + c[None, :], mask=of_a, other=0.0)
        summed = tl.dot(masked, tl.trans(right), summed, input_precision="ieee")
        part = tl.dot(tl.trans(left), masked, input_precision="ieee")
        tl.store(to_a + (tile * rank + k[:, None]).to(tl.int64) * cols + c[None, :], part, mask=of_a)
    tl.store(to_b + (strip * rows + far[:, None]) * rank + k[None, :], summed, mask=of_b)


def masked_sum(weight: Tensor, a: Tensor, b: Tensor, scale: float, whole: bool) -> Tensor:
    """Return the masked update [rows, cols], or weight plus update if `whole`; rounded once, to the weight's dtype.

    Args:
        weight, a, b: [rows, cols], [rank, cols] and [rows, rank] of one dtype of 16 or 32 bits; parts of larger ones
            may be.
    """
    (rows, cols), rank = weight.shape, len(a)
    weight, a, b = _lined_up(weight), _lined_up(a), _lined_up(b)
    result = torch.empty(rows, cols, dtype=weight.dtype, device=weight.device)
    masked_sum_tile[triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS)](
        weight,
        a,
        b,
        result,
        rows,
        cols,
        rank,
        weight.stride(0),
        a.stride(0),
        b.stride(0),
        scale,
        WHOLE=whole,
        ROWS=ROWS,
        COLS=COLS,
        RANKS=ranks_at_once(a),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return result


def factor_gradients(gradient: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return B^T G and G A^T for G = mask * `gradient`, float32 [rank, cols] and [rows, rank].

    Args:
        gradient: of the update, [rows, cols] in the dtype of the others.
    """
    (rows, cols), rank = weight.shape, len(a)
    gradient, weight, a, b = _lined_up(gradient), _lined_up(weight), _lined_up(a), _lined_up(b)
    tiles, strips, ranks = triton.cdiv(rows, ROWS), triton.cdiv(cols, STRIP), ranks_at_once(a)
    to_a = torch.empty(tiles, rank, cols, dtype=torch.float32, device=weight.device)
    to_b = torch.empty(strips, rows, rank, dtype=torch.float32, device=weight.device)
    factor_gradients_tile[tiles, strips, triton.cdiv(rank, ranks)](
        gradient,
        weight,
        a,
        b,
        to_a,
        to_b,
        rows,
        cols,
        rank,
        gradient.stride(0),
        weight.stride(0),
        a.stride(0),
        b.stride(0),
        ROWS=ROWS,
        COLS=COLS,
        STRIP=STRIP,
        RANKS=ranks,
        num_warps=WARPS,
    )
    return to_a.sum(0), to_b.sum(0)


def _lined_up(matrix: Tensor) -> Tensor:
    """Return a matrix whose columns are beside one another in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def ranks_at_once(a: Tensor) -> int:
    """Return how many of the rank are taken at a time: products on tensor cores have 16 at least."""
    return min(WIDE_RANKS if a.itemsize == 4 else RANKS, max(16, triton.next_power_of_2(len(a))))
