"""DeepSpeed's operations in C++ (collectives between CPUs, optimizers for offloaded states), compiled on first use.

torch's own way of building them waits for ever for a build that was killed, on every node that shares a home. Here one
is built in a folder of its own, with a time limit, and moved into the user's cache when it is whole: a file for each
operation, by the versions and the processor that it was built for.
"""

import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from shardprune.errors import TrainingError
from shardprune.signals import ending_with_this

BUILD_SECONDS = 600.0  # for one operation; and for another process that builds the same one
POLL_SECONDS = 0.2
FOLDER = "operations"  # in the training's state, where the user's cache cannot be written
# What compiled code depends on beside the versions of torch and DeepSpeed and the processor.
VARIABLES = ("CXX", "CXXFLAGS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST")
# Operations by the names of DeepSpeed's builders: what every training on CPUs uses, and what offloading does.
COLLECTIVES, OFFLOADED_ADAM = ("ShareMemCommBuilder", "deepspeed_shm_comm"), ("CPUAdamBuilder", "cpu_adam")
CHILD = "from shardprune.recovery.operations import build_here; build_here({!r})"


def build_what_is_used(offload: bool, state: str, say: Callable[[str], None]) -> None:
    """Build the operations of a training on CPUs that are not in the cache yet; `say` what takes the time.

    Raises:
        TrainingError: DeepSpeed cannot build one.
    """
    cache = Cache.of(state, "cpu")
    for builder, name in (COLLECTIVES, *((OFFLOADED_ADAM,) if offload else ())):
        if not cache.file(name).exists():
            say(f"building {name} of DeepSpeed, once for this machine: about half a minute")
            cache.built(builder, name)


def load_from_cache(state: str, device: str) -> None:
    """Let DeepSpeed load the operations that it uses in this process from the cache, built where they are not there."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    cache = Cache.of(state, device)

    def load(self: Any, verbose: bool = True) -> ModuleType:
        return _imported(self.name, cache.built(type(self).__name__, self.name))

    OpBuilder.jit_load = load


def build_here(builder: str) -> None:
    """Build an operation in this process, in torch's way, below TORCH_EXTENSIONS_DIR. It ends with its parent."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with suppress(ImportError):
        importlib.import_module("setuptools")  # which cannot be imported once DeepSpeed has imported distutils
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(builder).jit_load(verbose=False)


class Cache:
    """Built operations in a folder, for the accelerator that DeepSpeed builds for."""

    def __init__(self, folder: Path, accelerator: str = "cpu") -> None:
        self.folder, self.accelerator = folder, accelerator

    @classmethod
    def of(cls, state: str, device: str) -> "Cache":
        """Return the user's cache, or one in a training's state where there can be none."""
        accelerator = os.environ.get("DS_ACCELERATOR", device)
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "shardprune" / _built_for(accelerator)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return cls(folder, accelerator)
        except OSError:
            folder = Path(state) / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            return cls(folder, accelerator)

    def file(self, name: str) -> Path:
        """Return the library of an operation, which is there once it is built."""
        return self.folder / f"{name}.so"

    def built(self, builder: str, name: str, command: Sequence[str] = ()) -> Path:
        """Return the library of an operation, built if it is not there.

        Args:
            command: builds it below TORCH_EXTENSIONS_DIR; unless it is given, DeepSpeed's builder of the name.

        Raises:
            TrainingError: it cannot be built, or not in BUILD_SECONDS.
        """
        file = self.file(name)
        if file.exists():
            return file
        with self._alone(name):
            if not file.exists():
                command = command or (sys.executable, "-c", CHILD.format(builder))
                with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=self.folder) as folder:
                    self._build(name, command, Path(folder))
        return file

    def _build(self, name: str, command: Sequence[str], folder: Path) -> None:
        # DeepSpeed builds with ninja, which is installed beside the interpreter.
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        own = {"TORCH_EXTENSIONS_DIR": str(folder), "PATH": path, "DS_ACCELERATOR": self.accelerator}
        environment = {**os.environ, **own}
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            with ending_with_this(process.pid):
                try:
                    code = process.wait(BUILD_SECONDS)
                except subprocess.TimeoutExpired:
                    raise TrainingError(f"building {name} of DeepSpeed took more than {BUILD_SECONDS:g} s") from None
        found = list(folder.rglob(f"{name}.so"))
        if code or not found:
            raise TrainingError(f"DeepSpeed cannot build {name}: {_reason(folder / 'log', code)}")
        os.replace(found[0], self.file(name))

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Wait for other processes that build the same operation, BUILD_SECONDS at most.

        The lock is the kernel's, which frees it when its holder dies. Where a file system has none, several may build:
        each moves a whole file to the same place.
        """
        with open(self.folder / f"{name}.lock", "wb") as file:
            deadline = time.monotonic() + BUILD_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._remove_remains(name)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(POLL_SECONDS)
                except OSError:
                    break
            yield

    def _remove_remains(self, name: str) -> None:
        """Remove the folders of builds that were killed."""
        for folder in self.folder.glob(f"{name}.*/"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > 2 * BUILD_SECONDS:
                    shutil.rmtree(folder)


@functools.cache
def _imported(name: str, file: Path) -> ModuleType:
    """Import the library of an operation."""
    found = importlib.util.spec_from_file_location(name, file)
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _built_for(accelerator: str) -> str:
    """Return the name of what code that is compiled here works with.

    A home may be shared with a container, whose C library can be older than the machine's.
    """
    features = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if re.match(r"(flags|Features)\s*:", line)), features)
    settings = (os.environ.get(name, "") for name in VARIABLES)
    facts = [accelerator, platform.machine(), features, *platform.libc_ver(), *settings]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]
    return f"deepspeed-{version('deepspeed')}-torch-{version('torch')}-{sys.implementation.cache_tag}-{digest}"


def _reason(log: Path, code: int) -> str:
    """Return the first error in a build's output, or its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|Error\b", line)]
    return (errors or lines[-1:] or [f"exit code {code}"])[0]


def _end_with(parent: int) -> None:
    """End this process and those that it has started when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.killpg(os.getpgrp(), signal.SIGKILL)
