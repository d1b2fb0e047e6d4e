"""SparseGPT on one projection against the plain column-by-column formulation, side by side.

    python -m benchmarks.solver [--rows 2048 --cols 2048] [--threads 2] [--device cpu|cuda]

The plain formulation is that of the papers' code: two Cholesky factorisations and an inverse, blocks of
128 columns, a full sort for each block's threshold, one rank-one update of the block per column. Prints
the seconds of both, their ratio, and whether their masks agree.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from shardprune.solvers import sparsegpt
from shardprune.solvers.pattern import Unstructured
from shardprune.solvers.statistics import InputStatistics


def plain(weight: Tensor, hessian: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    w, h = weight.clone(), hessian.clone()
    rows, cols = w.shape
    h += 0.01 * h.diagonal().mean() * torch.eye(cols, device=h.device)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    whole_mask = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, cols, 128):
        end = min(start + 128, cols)
        block, errors = w[:, start:end].clone(), torch.zeros_like(w[:, start:end])
        tile = u[start:end, start:end]
        scores = block**2 / tile.diagonal() ** 2
        count = int(sparsity * rows * end + 0.5) - int(sparsity * rows * start + 0.5)
        mask = scores < scores.flatten().sort().values[count]
        for j in range(end - start):
            q = block[:, j].clone()
            q[mask[:, j]] = 0
            error = (block[:, j] - q) / tile[j, j]
            block[:, j:] -= error.unsqueeze(1) @ tile[j, j:].unsqueeze(0)
            block[:, j] = q
            errors[:, j] = error
        w[:, start:end] = block
        w[:, end:] -= errors @ u[start:end, end:]
        whole_mask[:, start:end] = mask
    return w, whole_mask


def seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    """The least time of several runs."""
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    mixing = torch.randn(args.cols, args.cols, device=args.device) / args.cols**0.5
    x = torch.randn(4, args.cols // 2, args.cols, device=args.device) @ (
        mixing + torch.eye(args.cols, device=args.device)
    )
    weight = torch.randn(args.rows, args.cols, device=args.device)
    statistics = InputStatistics.empty("gram", args.cols, args.device)
    statistics.add(x, len(x))

    def ours():
        statistics._factors.clear()  # the factor belongs to the time
        return sparsegpt.prune(weight, statistics, Unstructured(), args.sparsity)

    expected, mask = plain(weight, statistics.hessian, args.sparsity)
    solution = ours()
    agree = (solution.mask == mask).double().mean()
    distance = (solution.weight - expected).norm() / expected.norm()
    slow = seconds(lambda: plain(weight, statistics.hessian, args.sparsity), args.repeats, args.device)
    fast = seconds(ours, args.repeats, args.device)
    print(
        f"{args.rows} x {args.cols}, {args.sparsity:.0%} unstructured, float32, {args.device}, {args.threads} threads"
    )
    print(f"plain {slow:.3f} s   shardprune {fast:.3f} s   ratio {fast / slow:.3f}")
    print(f"masks agree in {agree:.6%} of the weights, relative distance of the weights {distance:.1e}")


if __name__ == "__main__":
    main()
