"""Settings of the solver's parts on one Hessian, each against the one that is in use: seconds, masks, weights."""

from collections.abc import Callable
from unittest.mock import patch

import torch

from benchmarks.gpu.numerics import AGREE
from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune.solvers import factor, products, sparsegpt
from shardprune.solvers.methods import DAMPING, Solution
from shardprune.solvers.pattern import Pattern, parse_pattern
from shardprune.solvers.statistics import InputStatistics

LEAVES = (256, 512, 1024, 2048)
RUNS = (128, 256, 512, 1024)  # terms that the tensor cores add up on their own
PROGRAMS = ((32, 1), (64, 2), (64, 4), (128, 4))  # rows and warps of the kernel's programs


def run(setting: Setting, rows: Rows) -> None:
    _runs(setting.size(8192, 512), setting, rows)
    narrow = _statistics(setting.size(8192, 512), setting)
    _leaves(narrow, setting, rows)
    _sweeps(narrow, setting, rows)
    del narrow
    wide = _statistics(setting.size(28672, 640), setting)
    taken = setting.seconds(lambda: factor.factorise(wide.sums, DAMPING, wide.scale), repeats=1)
    rows.add(f"factor of {len(wide.sums)} inputs", taken, "s")


def _statistics(cols: int, setting: Setting) -> InputStatistics:
    """Return sums over correlated inputs."""
    statistics = InputStatistics.empty("gram", cols, setting.device)
    mixing = torch.randn(64, cols, device=setting.device)
    for _ in range(2):
        common = torch.randn(cols, 64, device=setting.device) @ mixing
        statistics.add(common.mul_(0.05).add_(torch.randn(cols, cols, device=setting.device)).bfloat16(), 1)
    return statistics


def _runs(size: int, setting: Setting, rows: Rows) -> None:
    """Measure a product in float32's accuracy whose sums are cut after other numbers of terms."""
    left, right, target = (torch.randn(size, size, device=setting.device) for _ in range(3))
    exact = left[:256].double() @ right.double()
    for run in RUNS:
        with patch.object(products, "RUN", run):
            taken = setting.seconds(lambda: products.add_split_product(target, left, right, 1.0, 0.0), repeats=3)
        distance = float((target[:256].double() - exact).norm() / exact.norm())
        rows.add(f"product of {size}^3, runs of {run}", 2 * size**3 / taken / 1e12, "TFLOP/s")
        rows.add(f"runs of {run}, distance from float64", distance)


def _leaves(statistics: InputStatistics, setting: Setting, rows: Rows) -> None:
    """Measure the factorisation with recursions that end at other sizes."""
    field = "CUDA_LEAF" if setting.cuda else "LEAF"
    reference = statistics.factor(DAMPING)
    cols = len(statistics.sums)
    for leaf in LEAVES:
        with patch.object(factor, field, leaf):
            other = factor.factorise(statistics.sums, DAMPING, statistics.scale)
            taken = setting.seconds(lambda: factor.factorise(statistics.sums, DAMPING, statistics.scale), repeats=3)
        distance = float((other.steps - reference.steps).norm() / reference.steps.norm())
        rows.add(f"factor of {cols} inputs, leaves of {leaf}", 1e3 * taken, "ms")
        rows.add(f"leaves of {leaf}, distance from those in use", distance, ok=distance < 1e-4)


def _sweeps(statistics: InputStatistics, setting: Setting, rows: Rows) -> None:
    """Measure the sweep of a square projection: the kernel with other programs, and the recursion."""
    cols = len(statistics.sums)
    weight = torch.randn(cols, cols, device=setting.device)
    for name in ("unstructured", "2:4"):
        pattern = parse_pattern(name)

        def prune(pattern: Pattern = pattern) -> Solution:
            return sparsegpt.prune(weight, statistics, pattern, 0.5)

        label = f"sweep of {cols} x {cols}, {name}"
        used = prune()
        rows.add(f"{label}: way", str(used.sweep), ok=used.sweep == "kernel" if setting.cuda else None)
        rows.add(label, setting.seconds(prune, repeats=3), "s")
        if setting.cuda:
            from shardprune.solvers import column_kernel  # which imports Triton

            for height, warps in PROGRAMS:
                with patch.multiple(column_kernel, ROWS=height, WARPS=warps):
                    _against(used, f"{label}, {height} rows, {warps} warps", prune, setting, rows)
        with patch.object(sparsegpt, "kernels_run", lambda device: False):
            _against(used, f"{label}, recursion", prune, setting, rows)


def _against(used: Solution, label: str, prune: Callable[[], Solution], setting: Setting, rows: Rows) -> None:
    """Measure a variant, and compare its solution with that of the one in use."""
    other = prune()
    rows.add(label, setting.seconds(prune, repeats=1), "s")
    agree = float((other.mask == used.mask).double().mean())
    rows.add(f"{label}: masks agree", agree, ok=agree >= AGREE)
    rows.add(f"{label}: distance of the weights", float((other.weight - used.weight).norm() / used.weight.norm()))
