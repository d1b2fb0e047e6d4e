"""The machine: card, driver, versions, and the settings that change what a product of float32 is."""

import importlib.util
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting

PACKAGES = ("torch", "triton", "transformers", "accelerate", "deepspeed", "ray", "pydantic", "plotly")
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUBLAS_WORKSPACE_CONFIG",
)


def run(setting: Setting, rows: Rows) -> None:
    rows.add("CPU cores", len(os.sched_getaffinity(0)))
    for name in PACKAGES:
        try:
            rows.add(name, version(name))
        except PackageNotFoundError:
            rows.add(name, "there" if importlib.util.find_spec(name) else "not there")
    for name in VARIABLES:
        if name in os.environ:
            rows.add(name, os.environ[name])
    rows.add("TF32 in products of float32", torch.backends.cuda.matmul.allow_tf32)
    if not setting.cuda:
        return
    card = torch.cuda.get_device_properties(0)
    rows.add("card", card.name)
    rows.add("compute capability", f"{card.major}.{card.minor}")
    rows.add("multiprocessors", card.multi_processor_count)
    rows.add("memory", card.total_memory / 2**30, "GiB")
    rows.add("CUDA", str(torch.version.cuda))
    rows.add("driver", _driver())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
