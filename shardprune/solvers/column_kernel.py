"""SparseGPT's steps over the columns of one block as one Triton kernel.

Left-looking: with c_j a column as it enters the block, its turn begins with w_j = c_j - sum over i < j of steps[i, j] *
lost_i. A program has some rows and keeps all that they lose in registers: a column is read and written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from shardprune.solvers.factor import Factor
from shardprune.solvers.pattern import NM
from shardprune.solvers.radix_selection import RadixSelection, keys_of, tiles_of
from shardprune.solvers.stack import Stack

GROUP = 16  # columns of a group of N:M at most: a thread holds weights, scores and losses of one
ROWS, WARPS = 32, 1  # of a program: every thread has a row, and its losses take half of its registers


@triton.jit(do_not_specialize=["width", "place_bits"])
def sweep_block(
    columns,  # float32 [width, rows], `stride` apart; overwritten
    mask,  # uint8, likewise; filled
    lost,  # float32, likewise; filled
    squares,  # float64 [rows]: (lost / u_jj)^2 is added
    steps,  # float32 [width, 2 HALF]: row j has u_ij / u_ii of the columns i < j
    diagonal,  # float32 [width]
    tiles,  # int32 [programs, 4]: target, first row, first row of the target, end of the target
    keys,  # int64 [targets]: the largest key to be pruned, where M is 1
    width,
    stride,
    place_bits,
    HALF: tl.constexpr,  # columns of half a block
    ROWS: tl.constexpr,
    N: tl.constexpr,  # of M columns each that keep N; M is 1 where keys decide
    M: tl.constexpr,
    UNIT: tl.constexpr,  # a power of two, M at least
):
    tile = tl.program_id(0)
    start, end = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    r = tl.load(tiles + 4 * tile + 1) + tl.arange(0, ROWS)
    inside = r < end
    last = tl.load(keys + tl.load(tiles + 4 * tile))
    squared = tl.zeros([ROWS], dtype=tl.float32)
    # The losses, in halves: of the steps a thread holds only those that meet one half.
    i = tl.arange(0, HALF)
    first = tl.zeros([HALF, ROWS], dtype=tl.float32)
    second = tl.zeros([HALF, ROWS], dtype=tl.float32)
    k = tl.arange(0, UNIT)
    for left in range(0, width, M):
        weights = tl.zeros([UNIT, ROWS], dtype=tl.float32)  # of the unit, as the columns before it have corrected them
        scores = tl.full([UNIT, ROWS], float("inf"), dtype=tl.float32)
        key = tl.zeros([ROWS], dtype=tl.int64)
        for a in range(0, M):
            j = left + a
            entered = tl.load(columns + j * stride + r, mask=inside & (j < width), other=0.0)
            step = tl.load(steps + 2 * HALF * j + i, mask=(i < HALF) & (j < width), other=0.0)
            w = entered - tl.sum(step[:, None] * first, axis=0)
            step = tl.load(steps + 2 * HALF * j + HALF + i, mask=(i < HALF) & (j < width), other=0.0)
            w = w - tl.sum(step[:, None] * second, axis=0)
            weights = tl.where(k[:, None] == a, w[None, :], weights)
            u = tl.load(diagonal + j, mask=j < width, other=1.0)
            if M == 1:
                key = keys_of(entered, u, j * (end - start) + (r - start), place_bits)
            else:
                score = tl.math.div_rn(w, u)
                score = score * score
                # Columns that are not there, and NaNs, stay the largest.
                seen = (score == score) & (j < width)
                scores = tl.where((k[:, None] == a) & seen[None, :], score[None, :], scores)
        losses = tl.zeros([UNIT, ROWS], dtype=tl.float32)
        for a in range(0, M):
            j = left + a
            there = inside & (j < width)
            w = tl.sum(tl.where(k[:, None] == a, weights, 0.0), axis=0)
            if M == 1:
                chosen = key <= last
            else:
                step = tl.load(steps + 2 * HALF * j + left + k, mask=(k < a) & (j < width), other=0.0)
                w = w - tl.sum(step[:, None] * losses, axis=0)
                own = tl.sum(tl.where(k[:, None] == a, scores, 0.0), axis=0)[None, :]
                before = (scores < own) | ((scores == own) & (k[:, None] < a))
                chosen = tl.sum(before.to(tl.int32), axis=0) < tl.minimum(width - left, M) - N
            loss = tl.where(chosen & there, w, 0.0)
            tl.store(columns + j * stride + r, tl.where(chosen, 0.0, w), mask=there)
            tl.store(mask + j * stride + r, chosen.to(tl.uint8), mask=there)
            tl.store(lost + j * stride + r, loss, mask=there)
            ratio = loss / tl.load(diagonal + j, mask=j < width, other=1.0)
            squared += ratio * ratio
            first = tl.where(i[:, None] == j, loss[None, :], first)
            second = tl.where(i[:, None] + HALF == j, loss[None, :], second)
            losses = tl.where(k[:, None] == a, loss[None, :], losses)
    tl.store(squares + r, tl.load(squares + r, mask=inside, other=0.0) + squared.to(tl.float64), mask=inside)


class ColumnKernel:
    """The steps over the columns of a stack, block by block."""

    def __init__(self, stack: Stack, factor: Factor) -> None:
        self.stack, self.factor = stack, factor
        self._n, self._m = (stack.pattern.n, stack.pattern.m) if isinstance(stack.pattern, NM) else (0, 1)
        self._width = triton.next_power_of_2(stack.block)
        self._steps = _transposed_tiles(factor.steps, stack.block, self._width)
        self._tiles = tiles_of(stack, ROWS)
        self._selection = None if isinstance(stack.pattern, NM) else RadixSelection(stack)

    def prune_block(self, left: int, right: int) -> Tensor:
        """Prune the columns [left, right), a block; return the weights that they lose, [right - left, rows]."""
        columns, diagonal = self.stack.columns[left:right], self.factor.diagonal[left:right]
        lost, block = torch.empty_like(columns), left // self.stack.block
        if self._selection:
            self._selection.select(block, columns, diagonal)
        sweep_block[(len(self._tiles),)](
            columns,
            self.stack.mask[left:right].view(torch.uint8),
            lost,
            self.stack.squares,
            self._steps[block],
            diagonal,
            self._tiles,
            self._selection.keys if self._selection else self._tiles,
            right - left,
            columns.stride(0),
            self._selection.place_bits if self._selection else 0,
            HALF=self._width // 2,
            ROWS=ROWS,
            N=self._n,
            M=self._m,
            UNIT=triton.next_power_of_2(self._m),
            num_warps=WARPS,
        )
        return lost


def _transposed_tiles(steps: Tensor, block: int, width: int) -> Tensor:
    """Return the blocks on the diagonal of `steps` [cols, cols], each transposed: [blocks, block, width], zero behind
    its columns."""
    cols = len(steps)
    whole, rest = divmod(cols, block)
    tiles = steps.new_zeros((whole + (rest > 0), block, width))
    tiles[:whole, :, :block] = steps.as_strided((whole, block, block), (block * (cols + 1), 1, cols))
    if rest:
        tiles[whole, :rest, :rest] = steps[-rest:, -rest:].t()
    return tiles
