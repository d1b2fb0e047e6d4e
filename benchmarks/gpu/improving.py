"""Whole runs with what goes beyond SparseGPT: ALPS, shares by error curves, targets in the dense stream and training,
and a text that the model writes; on the device, where what takes gradients or draws is done twice, and on the CPU."""

import tempfile
from typing import Any

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.whole_run import digest_of, prune_bundled

NEAR = 1e-2  # of the perplexity after pruning: training goes on from sums in another order
RUNS: dict[str, dict[str, Any]] = {
    "alps": {"method": "alps"},
    "fisher": {"allocation": "fisher"},
    "trained": {"targets": "stream", "reconstruct": 5},
    "self": {"calibration": "self"},
}
TWICE = ("fisher", "trained", "self")
ELSEWHERE = ("alps", "fisher", "trained")  # on the CPU the model writes another text


def run(setting: Setting, rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in RUNS.items():
            fields = {"samples": setting.size(16, 8), "seqlen": 64, "eval_windows": setting.size(16, 2), **fields}
            found = prune_bundled(setting, setting.device, f"{folder}/{name}", rows, **fields)
            if name in TWICE:
                again = prune_bundled(setting, setting.device, f"{folder}/{name} again", rows, **fields)
                same = digest_of(f"{folder}/{name}") == digest_of(f"{folder}/{name} again") and again == found
                rows.add(f"{name}, again: the same to the bit", same, ok=same)
            if setting.cuda and name in ELSEWHERE:
                there = prune_bundled(setting, "cpu", f"{folder}/{name} on the CPU", rows, **fields)
                distance = abs(found.after / there.after - 1)
                rows.add(f"{name}: perplexity, distance from the CPU's", distance, ok=distance < NEAR)
