"""The tests with the marker `gpu`: those that need no Ray."""

import importlib.util
import os
import re
import subprocess
import sys

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting

TESTS = (
    "tests/solvers",
    "tests/shard",
    "tests/model/test_skeleton.py",
    "tests/commands/structured/test_width.py",
    "tests/commands/test_export.py",
    "tests/commands/test_on_a_gpu.py",
    "tests/recovery/test_on_a_gpu.py",  # skipped without DeepSpeed
)
PROCESSES = 14  # each has a CUDA context of its own
SMALL = ("tests/solvers/test_column_kernel.py",)


def run(setting: Setting, rows: Rows) -> None:
    if not importlib.util.find_spec("pytest"):
        rows.add("skipped", "pytest is not installed")
        return
    # The step has a limit of its own; pytest-timeout need not be there.
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:timeout"]
    if importlib.util.find_spec("xdist") and not setting.small:
        words += ["--numprocesses", str(PROCESSES)]
    done = subprocess.run(
        [*words, *(SMALL if setting.small else TESTS)],
        env={**os.environ, "DS_ACCELERATOR": setting.device},
        capture_output=True,
        text=True,
    )
    print(done.stdout, done.stderr)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped|failed|errors?)\b", done.stdout)}
    for word, count in counts.items():
        rows.add(word, count, "tests", ok=False if word in ("failed", "error", "errors") else None)
    passed = counts.get("passed", 0)
    rows.add("exit code of pytest", done.returncode, ok=done.returncode == 0 and (passed > 0 or not setting.cuda))
