"""The k-th smallest score of a block of columns, by Triton: exact, in a few launches, without a look by the host.

A weight's key is its score's bits, which order like the scores since none is negative, followed by its place in the
block, column by column: keys differ, and of equal scores the first counts as the smallest. Radix selection finds the
k-th key digit by digit: a pass counts those keys by their next digit that begin like it so far.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from shardprune.solvers.stack import Stack

SCORE_BITS = 31  # of a float32 without its sign
DIGIT = 11  # bits
COPIES = 4  # of a histogram: programs that add to different ones do not wait for one another
COLUMNS, ROWS = 32, 256  # of a program
WARPS = 8


@triton.jit
def keys_of(weights, diagonal, places, place_bits):
    """The keys, int64, of weights with the diagonal of U at their columns and their places in the block."""
    scores = tl.math.div_rn(weights, diagonal)
    scores = scores * scores
    bits = scores.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaNs are the largest
    return (bits.to(tl.int64) << place_bits) | places.to(tl.int64)


@triton.jit
def _narrowed(histograms, state, BINS: tl.constexpr, COPIES: tl.constexpr):
    """The first digits of the k-th key, and its rank among the keys that begin so, from those of the pass before and
    its histograms [COPIES, BINS]."""
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], dtype=tl.int32)
    for copy in tl.static_range(COPIES):
        counts += tl.load(histograms + copy * BINS + bins)
    prefix, rank = tl.load(state), tl.load(state + 1)
    before = tl.cumsum(counts, 0) < rank
    digit = tl.sum(before.to(tl.int32), 0)
    below = tl.sum(tl.where(before, counts, 0), 0)
    return prefix * BINS + digit, rank - below


@triton.jit(do_not_specialize=["width", "place_bits", "shift"])
def _count(
    columns,  # [width, rows] of the block, `stride` apart
    diagonal,  # [width]
    tiles,  # int32 [programs, 4]: target, first row, first row of the target, end of the target
    found,  # int32 [targets, COPIES, BINS]: histograms of the pass before
    known,  # int64 [targets, 2]: its prefix and rank
    histograms,  # of this pass
    state,  # of this pass
    width,
    stride,
    place_bits,
    shift,
    FIRST: tl.constexpr,
    DIGIT: tl.constexpr,
    COPIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    BINS: tl.constexpr = 1 << DIGIT
    target, left = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    start, end = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    j = part * COLUMNS + tl.arange(0, COLUMNS)
    r = left + tl.arange(0, ROWS)
    counted = (j < width)[:, None] & (r < end)[None, :]
    weights = tl.load(columns + j[:, None] * stride + r[None, :], mask=counted, other=0.0)
    u = tl.load(diagonal + j, mask=j < width, other=1.0)
    places = j[:, None] * (end - start) + (r - start)[None, :]
    keys = keys_of(weights, u[:, None], places, place_bits)
    if not FIRST:
        prefix, rank = _narrowed(found + target * COPIES * BINS, known + 2 * target, BINS, COPIES)
        counted = counted & ((keys >> (shift + DIGIT)) == prefix)
        if (left == start) & (part == 0):
            tl.store(state + 2 * target, prefix)
            tl.store(state + 2 * target + 1, rank)
    digits = ((keys >> shift) & (BINS - 1)).to(tl.int32)
    own = histograms + (target * COPIES + (tile + part) % COPIES) * BINS
    tl.atomic_add(own + digits, 1, mask=counted, sem="relaxed")


@triton.jit
def _settle(found, known, counts, keys, DIGIT: tl.constexpr, COPIES: tl.constexpr):
    """Store the k-th key of each target; one below all keys where k is 0."""
    target = tl.program_id(0)
    BINS: tl.constexpr = 1 << DIGIT
    key, _ = _narrowed(found + target * COPIES * BINS, known + 2 * target, BINS, COPIES)
    tl.store(keys + target, tl.where(tl.load(counts + target) > 0, key, -1))


class RadixSelection:
    """The selection of the smallest scores of each projection of a stack, block by block.

    Attributes:
        place_bits: bits of a weight's place in its projection's part of a block.
        keys: int64 [projections]: the largest key to be pruned in the block that was selected last.
    """

    def __init__(self, stack: "Stack") -> None:
        device, targets = stack.columns.device, len(stack.spans)
        largest = max(span.stop - span.start for span in stack.spans) * stack.block
        self.place_bits = (largest - 1).bit_length()
        self.passes = -(-(SCORE_BITS + self.place_bits) // DIGIT)
        self.keys = torch.empty(targets, dtype=torch.int64, device=device)
        self._stack = stack
        self._tiles = tiles_of(stack, ROWS)
        self._histograms = torch.empty((self.passes, targets, COPIES, 1 << DIGIT), dtype=torch.int32, device=device)
        # Of each block: prefix and rank before each pass; before the first nothing is known, and the rank is the count.
        counts = torch.tensor([stack.counts(left, right) for left, right in stack.blocks])
        state = torch.zeros((len(stack.blocks), self.passes, targets, 2), dtype=torch.int64)
        state[:, 0, :, 1] = counts
        self._state = state.to(device, non_blocking=True)
        self._counts = counts.to(device, non_blocking=True)

    def select(self, block: int, columns: Tensor, diagonal: Tensor) -> None:
        """Find the keys of a block with these columns [width, rows] and this diagonal of U [width]."""
        state, histograms, place_bits = self._state[block], self._histograms.zero_(), self.place_bits
        width, stride = len(columns), columns.stride(0)
        grid = (len(self._tiles), triton.cdiv(width, COLUMNS))
        for turn in range(self.passes):
            before = max(0, turn - 1)
            _count[grid](
                columns,
                diagonal,
                self._tiles,
                histograms[before],
                state[before],
                histograms[turn],
                state[turn],
                width,
                stride,
                place_bits,
                (self.passes - 1 - turn) * DIGIT,
                FIRST=turn == 0,
                DIGIT=DIGIT,
                COPIES=COPIES,
                COLUMNS=COLUMNS,
                ROWS=ROWS,
                num_warps=WARPS,
            )
        _settle[(len(self.keys),)](
            histograms[-1], state[-1], self._counts[block], self.keys, DIGIT=DIGIT, COPIES=COPIES, num_warps=WARPS
        )


def tiles_of(stack: "Stack", rows: int) -> Tensor:
    """Return the programs over a stack's rows, up to `rows` of one projection each: the projection's number, the
    program's first row, the projection's first row and the one behind its last; int32 [programs, 4].
    """
    tiles = [
        (target, row, span.start, span.stop)
        for target, span in enumerate(stack.spans)
        for row in range(span.start, span.stop, rows)
    ]
    return torch.tensor(tiles, dtype=torch.int32).to(stack.columns.device, non_blocking=True)
