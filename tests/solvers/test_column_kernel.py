"""SparseGPT's kernels: interpreted against the recursion, compiled for a GPU that need not be there, and on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.solvers.kernel_cases import CASES, compared
from tests.support.compiled import resources

pytest.importorskip("triton", reason="Triton is for Linux")
TIES = [False, True]


@pytest.fixture(scope="module")
def interpreted():
    """The comparisons of all cases, by name and whether scores tie."""
    command = [sys.executable, "-m", "tests.solvers.kernel_cases", json.dumps(list(CASES))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(name, ties): found for name, ties, found in map(json.loads, done.stdout.splitlines())}


def check(found):
    assert found["ways"] == [True, True]
    assert found["differing"] == found["broken"] == found["nonzero"] == 0
    assert found["zeros"] == found["expected"]
    assert found["distance"] < 1e-5
    assert found["lost"] == pytest.approx(found["lost by the recursion"], rel=1e-5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", CASES)
def test_the_interpreted_kernel_agrees_with_the_recursion(interpreted, name, ties):
    check(interpreted[name, ties])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_agrees_with_the_recursion(name, ties):
    check(compared(name, ties, "cuda"))


SWEEP = {
    "columns": "*fp32",
    "mask": "*u8",
    "lost": "*fp32",
    "squares": "*fp64",
    "steps": "*fp32",
    "diagonal": "*fp32",
    "tiles": "*i32",
    "keys": "*i64",
    "width": "i32",
    "stride": "i32",
    "place_bits": "i32",
}
COUNT = {
    "columns": "*fp32",
    "diagonal": "*fp32",
    "tiles": "*i32",
    "found": "*i32",
    "known": "*i64",
    "histograms": "*i32",
    "state": "*i64",
    "width": "i32",
    "stride": "i32",
    "place_bits": "i32",
    "shift": "i32",
}
SETTLE = {"found": "*i32", "known": "*i64", "counts": "*i64", "keys": "*i64"}


# Groups of three or five cost two registers more than there are.
@pytest.mark.parametrize(
    ("n", "m", "spilled"), [(0, 1, 0), (2, 4, 0), (1, 4, 0), (4, 8, 0), (2, 8, 0), (8, 16, 0), (3, 5, 16)]
)
def test_the_compiled_sweep_keeps_its_losses_in_registers(tmp_path, n, m, spilled):
    import triton

    from shardprune.solvers import column_kernel

    constants = {"HALF": 64, "ROWS": column_kernel.ROWS, "N": n, "M": m, "UNIT": triton.next_power_of_2(m)}
    registers, stack = resources(tmp_path, column_kernel.sweep_block, SWEEP, constants, num_warps=column_kernel.WARPS)
    assert 128 < registers <= 255
    assert stack <= spilled


def test_the_compiled_selection_spills_nothing(tmp_path):
    from shardprune.solvers import radix_selection as radix

    shape = {"COLUMNS": radix.COLUMNS, "ROWS": radix.ROWS}
    digits = {"DIGIT": radix.DIGIT, "COPIES": radix.COPIES}
    for first in True, False:
        constants = {"FIRST": first, **digits, **shape}
        registers, stack = resources(tmp_path, radix._count, COUNT, constants, num_warps=radix.WARPS)
        assert registers <= 255
        assert stack == 0
    registers, stack = resources(tmp_path, radix._settle, SETTLE, digits, num_warps=radix.WARPS)
    assert registers <= 255
    assert stack == 0
