"""Kernels of masked updates: interpreted against float64 and torch's products, compiled for a GPU, and on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardprune.recovery.masked_update import way_of
from tests.recovery.masked_update_cases import CASES, compared
from tests.support.compiled import resources

pytest.importorskip("triton", reason="Triton is for Linux")


@pytest.fixture(scope="module")
def interpreted():
    """The distances of all cases."""
    command = [sys.executable, "-m", "tests.recovery.masked_update_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(map(json.loads, done.stdout.splitlines()))


ROUNDED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def check(name, distances):
    assert distances.keys() == {"outputs", "inputs", "A", "B"}
    for result, (kernel, products) in distances.items():
        assert kernel < ROUNDED[CASES[name][3]], result
        assert kernel < 1.1 * products, result  # the kernel rounds a weight and its update once


@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernels_are_as_near_to_the_formula_as_products(interpreted, name):
    check(name, interpreted[name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_as_near_to_the_formula_as_products(name):
    check(name, compared(name, "cuda"))


def test_other_devices_and_dtypes_take_products():
    assert way_of(torch.empty(1)) == "products"
    assert way_of(torch.empty(1, dtype=torch.float64)) == "products"


SIZES = dict.fromkeys(("rows", "cols", "rank"), "i32")
STRIDES = dict.fromkeys(("weight_stride", "a_stride", "b_stride"), "i32")


@pytest.mark.parametrize("rank", [8, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compiled_kernels_spill_nothing(tmp_path, dtype, rank):
    from shardprune.recovery import masked_update_kernel as kernels

    matrix = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    tile = {"ROWS": kernels.ROWS, "COLS": kernels.COLS, "RANKS": kernels.ranks_at_once(torch.empty(rank, 1).to(dtype))}
    operands = dict.fromkeys(("weight", "a", "b"), matrix)
    summing = {**operands, "result": matrix, **SIZES, **STRIDES, "scale": "fp32"}
    gradients = {
        **{"gradient": matrix, **operands, "to_a": "*fp32", "to_b": "*fp32"},
        **{**SIZES, "gradient_stride": "i32", **STRIDES},
    }
    for kernel, signature, constants, options in (
        (kernels.masked_sum_tile, summing, {"WHOLE": True, **tile}, {"num_stages": kernels.STAGES}),
        (kernels.factor_gradients_tile, gradients, {"STRIP": kernels.STRIP, **tile}, {}),
    ):
        registers, stack = resources(tmp_path, kernel, signature, constants, num_warps=kernels.WARPS, **options)
        assert registers <= 255
        assert stack == 0
