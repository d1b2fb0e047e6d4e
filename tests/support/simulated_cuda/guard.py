"""The device guard that torch asks for "cuda", compiled once for each version of torch and of its source."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")
BUILT = Path(__file__).parents[3] / "build" / "simulated-cuda"
TORCH = Path(torch.__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++")


@functools.cache
def load_guard() -> None:
    """Register the guard in this process, compiling it where no other process has."""
    ctypes.CDLL(str(_library()), mode=os.RTLD_LOCAL | os.RTLD_NOW)


def _library() -> Path:
    """Return the shared library."""
    assert COMPILER, "no C++ compiler"
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode() + str(TORCH).encode()).hexdigest()[:16]
    library = BUILT / f"guard-{key}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = BUILT / f"{library.name}.{os.getpid()}"  # of this process: several may compile at once
        subprocess.run(
            [
                *(COMPILER, "-O1", "-std=c++20", "-fPIC", "-shared", f"-I{TORCH / 'include'}"),
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
                *(str(SOURCE), "-o", str(unfinished), f"-L{TORCH / 'lib'}", "-lc10"),
            ],
            check=True,
        )
        unfinished.rename(library)
    return library
