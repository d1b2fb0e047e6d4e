"""The memory of the temporaries of solving an input's projections, and of training a layer. All sizes are bytes."""

from collections.abc import Iterator

from shardprune.planning.shapes import Input
from shardprune.planning.workload import Task
from shardprune.solvers.products import split_bytes
from shardprune.solvers.selection import SORTED
from shardprune.solvers.sparsegpt import SUMMED
from shardprune.solvers.stack import BLOCK
from shardprune.solvers.triangles import PANELS


def solving(task: Task, one: Input, gpu: bool) -> Iterator[tuple[str, int]]:
    """Yield the workspace of each step of solving the projections that read an input, without its sums."""
    square, weights, rows = one.cols**2, one.largest, sum(one.rows.values())
    dense = 4 * weights if task.itemsize != 4 else 0  # float32 layers are used as they are
    narrow = 2 * weights if task.stored != 4 else 0  # in the stored dtype
    yield "merge", 0
    swept = 0
    # Checks of the result: finite entries, zeros, and N:M groups counted in int32.
    checking = (11 if task.grouped else 6) * weights
    # float32 values and int64 places, which CUDA's sort has three times; its top-k of half the entries takes less.
    sorting = (36 if gpu else 12) * min(weights, SORTED)
    choosing = (20 if gpu else 4) * weights
    effort = task.effort
    # The factor; in the recursion half a matrix more. Products on CUDA split their operands.
    split = split_bytes(square // 4 * (PANELS + 1) // PANELS) if gpu else 0
    held = 0
    if effort.sweeps:
        yield "factor", 6 * square + split
        # Beside the factor, float32 columns and masks of all projections that read the input; then a block's scores
        # and losses, or a part of the change.
        swept = 4 * square + 5 * one.cols * rows
        yield "sweep", swept + max(20 * BLOCK * rows, 4 * min(weights, SUMMED))
        yield "check", swept + narrow + checking
    elif effort.factors:
        # The scaled Gram matrix, and what iterations go on from for all projections that read the input.
        held = 4 * square + effort.states * one.cols * rows
        yield "factor", held + 6 * square + split
        # Beside the factor an iteration's result and two others; or scores and mask, and what chooses from them.
        choosing_here = (sorting if task.grouped else choosing) + 9 * weights
        yield "iterate", held + 4 * square + max(12 * weights, choosing_here)
    elif not effort.sorts:
        yield "select", dense + 4 * weights + (sorting if task.grouped else choosing)
    else:
        if effort.running:
            sorting = ((36 if gpu else 12) + effort.running) * weights
        yield "select", dense + 4 * weights + sorting
    if not effort.sweeps:
        yield "check", held + dense + 5 * weights + narrow + checking
    if effort.products:
        # Conjugate gradients: the weight, its image, two directions, a product, on CUDA with split operands.
        split = split_bytes(weights + square) if gpu else 0
        yield "fit", max(held, swept + 4 * square) + 4 * weights + 21 * weights + split
    if task.errors:
        # A panel of the dense weight's product with the Gram matrix, which a CPU also widens to float64, on CUDA
        # with split operands. The change is another weight, unless the sweep knows what outputs lose.
        split = split_bytes(weights + square // PANELS) if gpu else 0
        pruned = swept if effort.sweeps else 8 * weights
        yield "error", pruned + dense + narrow + 12 * weights // PANELS + split


def passing_for_gradients(task: Task, sequences: int, gpu: bool) -> int:
    """Return the bytes that a decoder layer's pass over a batch keeps for its gradients: what enters every product
    and what an activation function or norm needs, the scores of attention where its gradient must be repeatable,
    and the error in float32.
    """
    model = task.model
    tokens = sequences * task.seqlen
    inputs = sum(int(tokens * one.share) * (one.cols + 2 * sum(one.rows.values())) for one in model.inputs)
    scores = 3 * model.heads * task.seqlen * tokens * 4 if gpu or model.eager else 0
    return task.itemsize * (inputs + 6 * tokens * model.hidden) + scores + 8 * tokens * model.hidden


def passing_for_routers(task: Task, sequences: int) -> int:
    """Return the bytes of a pass over a batch for the gradients of routers alone, which keeps what the experts of
    every token give, beside the temporaries of a pass."""
    model = task.model
    tokens = sequences * task.seqlen
    given = sum(int(tokens * one.share) for one in model.shape.maps if one.share < 1 and one.output)
    kept = task.itemsize * model.hidden * (given + 6 * tokens) + 8 * tokens * model.hidden
    return kept + model.forward_bytes(sequences, task.seqlen, task.itemsize)


def state_of_training(itemsize: int) -> int:
    """Return the bytes that a trained weight takes between steps beside itself: two moments, and its float32 value
    where it is computed with in another dtype."""
    return 8 if itemsize == 4 else 12
