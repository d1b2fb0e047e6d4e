"""The operations that pruning with SparseGPT cannot do without, and the rate of a large product on this machine."""

import time

import torch

from shardprune.planning.workload import Model

SIZE = 2048


def operations(model: Model, samples: int, seqlen: int) -> int:
    """Return the operations of a run that measures output errors, a multiplication and an addition being two.

    For T tokens and, at each of the four inputs of a layer, c columns and r rows of all projections that read it:

        forward    two passes of every layer but the last, which needs one; the first stops at the last input
        Gram       T c^2: half of a symmetric matrix
        factor     2/3 c^3: a Cholesky factor, and the inverse of a triangle
        sweep      r c^2: every column corrects those to its right
        norms      r c^2: ||X W^T||^2 from half of the Gram matrix
    """
    tokens = samples * seqlen
    passing = model.forward_operations(tokens, seqlen)
    *_, last = model.inputs
    stopped = passing - 2 * tokens * last.cols * sum(last.rows.values())
    solving = sum(
        tokens * one.cols**2 + 2 * one.cols**3 // 3 + 2 * sum(one.rows.values()) * one.cols**2 for one in model.inputs
    )
    return model.layers * (stopped + solving) + (model.layers - 1) * passing


def rate(repeats: int = 5) -> float:
    """Return the operations a second of a large float32 product in this process, with the threads that it has."""
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    left @ right
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best
