"""One decoder layer of Llama-70B shape, as benchmarks/layer_70b prunes it: seconds of each step, peak memory."""

import argparse

import torch

from benchmarks import layer_70b
from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting

CASES = {
    "SparseGPT 50 %": (),
    "SparseGPT 50 %, no errors": ("--no-error",),
    "SparseGPT 2:4": ("--pattern", "2:4"),
}
SMALL = (
    *("--hidden", "64", "--intermediate", "96", "--heads", "4", "--kv-heads", "2"),
    *("--samples", "4", "--seqlen", "32"),
)


def options(setting: Setting, *words: str) -> argparse.Namespace:
    """Return the options of layer_70b on the device of a setting, in its sizes."""
    sizes = SMALL if setting.small else ()
    return layer_70b.options().parse_args(["--device", setting.device, *sizes, *words])


def run(setting: Setting, rows: Rows) -> None:
    for place, (label, words) in enumerate(CASES.items()):
        if setting.cuda:
            torch.cuda.reset_peak_memory_stats()
        # Kernels are loaded and compiled in a small layer first.
        seconds = layer_70b.measure(options(setting, *words), warmup=place != 1 and setting.cuda)
        for step, taken in seconds.items():
            rows.add(f"{label}: {step}", taken, "s")
        rows.add(f"{label}: all", sum(seconds.values()), "s")
        rows.add(f"{label}: peak memory", layer_70b.peak_memory(setting.device))
