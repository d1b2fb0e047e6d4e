"""Every solver on the simulated GPU gives what it gives on the CPU."""

import pytest
import torch

from shardprune.solvers import outliers, structures
from shardprune.solvers.barber import Masked, rebuild, scores
from shardprune.solvers.methods import METHODS, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics, output_error
from tests.simulated.bounds import TOLERANCE
from tests.support.simulated_cuda import needs_simulated_cuda, simulated_cuda, to_cpu

pytestmark = needs_simulated_cuda

ROWS, COLS, TOKENS = 24, 200, 300  # a block of columns and a part of one
PATTERNS = ("unstructured", "2:4", "3:5")


def drawn(*shape: int, seed: int = 0, ties: bool = False) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.mul_(4).round_() if ties else values


def statistics(device: str, kind="gram") -> InputStatistics:
    inputs = drawn(TOKENS, COLS, seed=1)
    inputs[:, [3, 150]] = 0  # dead
    found = InputStatistics.empty(kind, COLS, device)
    for wave in inputs.to(device).split(100):
        found.add(wave, 2)
    return found


def both(step):
    """The results of a step on the GPU and on the CPU; float32 of the first as CPU tensors."""
    with simulated_cuda():
        there = step("cuda")
    return there, step("cpu")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_methods(method, pattern, ties):
    needs = METHODS[method].needs

    def step(device: str):
        known = statistics(device, needs) if needs else None
        weight = drawn(ROWS, COLS, ties=ties).to(device)
        return next(METHODS[method].solve([Target(weight, parse_pattern(pattern), 0.5)], known))

    if method == "wanda-variant" and pattern != "unstructured":
        pytest.skip("it has no N:M")
    there, here = both(step)
    assert there.weight.is_cuda
    assert torch.equal(to_cpu(there.mask), here.mask)
    tolerance = (TOLERANCE if METHODS[method].needs == "gram" else 0.0) * float(here.weight.abs().max())
    assert torch.allclose(to_cpu(there.weight), here.weight, rtol=0, atol=tolerance)


def test_output_errors():
    def step(device: str) -> float:
        dense = drawn(ROWS, COLS).to(device)
        return output_error(dense, dense * (dense.abs() > 0.5), statistics(device))

    there, here = both(step)
    assert there == pytest.approx(here, rel=1e-6)


def test_sums_in_bfloat16_are_float32():
    def step(device: str):
        found = InputStatistics.empty("gram", COLS, device)
        found.add(drawn(TOKENS, COLS).bfloat16().to(device), 1)
        return found.sums

    there, here = both(step)
    assert there.dtype == torch.float32
    assert torch.allclose(to_cpu(there).tril(), here.tril(), rtol=0, atol=1e-6 * float(here.max()))


def test_outlier_ratios():
    def step(device: str):
        known = statistics(device, "squares")
        return outliers.outlier_ratios({"q": (drawn(ROWS, COLS).to(device), known.mean_squares)}, 2.0)

    there, here = both(step)
    assert there == here


@pytest.mark.parametrize("granularity", ["row", "column", "projection", "block"])
def test_masks_are_rebuilt(granularity):
    def step(device: str):
        block = []
        for seed in (0, 1):
            weight = drawn(ROWS, COLS, seed=seed).to(device)
            mask = weight.abs() < 0.7
            squares = drawn(ROWS, COLS, seed=seed + 2).square().to(device)
            block.append(Masked(scores("gradient", weight, squares, mask), mask, parse_pattern("unstructured")))
        return rebuild(block, granularity, 0.2)

    (there, swaps), (here, expected) = both(step)
    assert swaps == expected > 0
    assert all(torch.equal(to_cpu(one), other) for one, other in zip(there, here, strict=True))


def test_structures_and_their_correction():
    def step(device: str):
        known, weight = statistics(device), drawn(ROWS, COLS).to(device)
        chosen = structures.keep_by_error(weight, known.factor(0.01), 4, 30)
        kept = structures.columns_of(chosen, 4)
        return kept, structures.correct(weight, known, kept).weight

    (kept, weight), (expected, corrected) = both(step)
    assert torch.equal(to_cpu(kept), expected)
    assert torch.allclose(to_cpu(weight), corrected, rtol=0, atol=TOLERANCE * float(corrected.abs().max()))
