"""Whether Triton's kernels can be built and run on a device."""

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

CAPABILITY = (8, 0)  # of GPUs that the kernels are compiled for, at the least


@cache
def kernels_run(device: torch.device) -> bool:
    """Return whether a device is a GPU that Triton supports, and Triton is here with what it builds its launchers with:
    a C compiler and Python's headers.
    """
    if device.type != "cuda" or not torch.backends.cuda.is_built() or not importlib.util.find_spec("triton"):
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return bool(compiler) and headers.is_file() and torch.cuda.get_device_capability(device) >= CAPABILITY
