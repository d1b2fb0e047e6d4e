"""SparseGPT's kernels against its recursion: the cases, and how they are compared.

As a program (`python -m tests.solvers.kernel_cases '["50 %"]'`, TRITON_INTERPRET=1) it prints one JSON line a case:
whether kernels are interpreted is settled for a process when it defines them.
"""

import json
import sys
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from shardprune.solvers import sparsegpt, stack
from shardprune.solvers.methods import Solution, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics

# Pattern, rows and sparsity of each projection that reads the input, number of inputs as halves of a block and further
# ones, those that are always zero.
CASES: dict[str, tuple[str, list[tuple[int, float]], tuple[int, int], list[int]]] = {
    "50 %": ("unstructured", [(40, 0.5)], (2, 0), []),
    "70 %, width no multiple": ("unstructured", [(17, 0.7)], (2, 22), []),
    "three projections": ("unstructured", [(33, 0.5), (5, 0.7), (20, 0.0)], (2, 12), [0, 3, -13, -12]),
    "2:4, width no multiple": ("2:4", [(17, 0.5), (7, 0.5)], (2, 3), [0, 2, 3, -2]),
    "4:8": ("4:8", [(9, 0.5)], (2, 8), []),
    "1:4": ("1:4", [(9, 0.75)], (1, 2), []),
    "3:5": ("3:5", [(9, 0.4)], (2, 4), [4, -1]),
    "two patterns, one keeps all": ("mixed:8", [(4, 0.0), (5, 0.5)], (0, 20), []),
}
# The interpreter takes a millisecond for what a GPU does at once: columns of a block, and of a program that counts.
INTERPRETED_BLOCK, INTERPRETED_COLUMNS = 32, 16


def material(name: str, ties: bool, device: str) -> tuple[list[Target], InputStatistics]:
    name_of_pattern, shapes, (halves, rest), dead = CASES[name]
    cols = halves * stack.BLOCK // 2 + rest
    generator = torch.Generator().manual_seed(cols)
    x = torch.randn(4, 2 * cols, cols, generator=generator) @ (
        torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    )
    x[..., dead] = 0
    weights = [torch.randn(rows, cols, generator=generator) for rows, _ in shapes]
    if ties:  # few values, and inputs of which none tells about another: scores are equal in their thousands
        weights = [(weight * 2).round() / 2 for weight in weights]
        x = torch.eye(cols).expand(4, -1, -1).clone()
        x[..., dead] = 0
    statistics = InputStatistics.empty("gram", cols, device)
    statistics.add(x.to(device), samples=4)
    pattern = parse_pattern(name_of_pattern)
    targets = [
        Target(weight.to(device), pattern.at(sparsity), sparsity)
        for weight, (_, sparsity) in zip(weights, shapes, strict=True)
    ]
    return targets, statistics


def both_ways(targets: list[Target], statistics: InputStatistics) -> tuple[list[Solution], list[Solution]]:
    """The solutions by the kernel and by the recursion."""
    runs, found = sparsegpt.kernels_run, []
    for answer in True, False:
        sparsegpt.kernels_run = lambda _device, answer=answer: answer
        found.append(sparsegpt.prune_together(targets, statistics))
    sparsegpt.kernels_run = runs
    return found[0], found[1]


def interpreted(name: str, ties: bool) -> dict[str, Any]:
    """What `compared` finds with small blocks."""
    from shardprune.solvers import radix_selection

    with patch.object(stack, "BLOCK", INTERPRETED_BLOCK), patch.object(radix_selection, "COLUMNS", INTERPRETED_COLUMNS):
        return compared(name, ties)


def compared(name: str, ties: bool, device: str = "cpu") -> dict[str, Any]:
    targets, statistics = material(name, ties, device)
    kernel, recursion = both_ways(targets, statistics)
    grouped = [target.pattern.broken(solution.weight) for target, solution in zip(targets, kernel, strict=True)]
    return {
        "ways": [
            {solution.sweep for solution in found} == {way}
            for found, way in ((kernel, "kernel"), (recursion, "recursion"))
        ],
        "differing": sum(int((a.mask != b.mask).sum()) for a, b in zip(kernel, recursion, strict=True)),
        "zeros": [int(solution.mask.sum()) for solution in kernel],
        "expected": [target.pattern.zeros(*target.weight.shape, target.sparsity) for target in targets],
        "broken": sum(int(groups) for groups in grouped),
        "nonzero": sum(int((solution.weight[solution.mask] != 0).sum()) for solution in kernel),
        "distance": max(_relative(a.weight, b.weight) for a, b in zip(kernel, recursion, strict=True)),
        "lost": [float(solution.lost) for solution in kernel],
        "lost by the recursion": [float(solution.lost) for solution in recursion],
    }


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in json.loads(sys.argv[1]):
        for ties in False, True:
            print(json.dumps([name, ties, interpreted(name, ties)]), flush=True)
