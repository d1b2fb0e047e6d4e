"""Blocks that are freed and taken again: counted by the pages that the kernel makes anew."""

import os
import platform
import subprocess
import sys

import pytest

from shardprune.shard.heap import MMAPPED, VARIABLES

PROGRAM = """
import resource, sys
from shardprune.shard.heap import keep_freed_blocks
kept = keep_freed_blocks() if sys.argv[1] == "kept" else None
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
size = int(sys.argv[2])
bytearray(size)
before = faults()
for _ in range(8):
    bytearray(size)
print(kept, (faults() - before) * resource.getpagesize() / size)
"""


def renewed(words: list[str], **variables: str) -> tuple[str, float]:
    """What `keep_freed_blocks` returned, and how often eight blocks' pages were made anew."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    kept, times = done.stdout.split()
    return kept, float(times)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_are_taken_again():
    size = str(MMAPPED * 3 // 4)
    assert renewed(["not", size])[1] > 7
    kept, times = renewed(["kept", size])
    assert kept == "True"
    assert times < 0.1
    assert renewed(["kept", str(MMAPPED * 2)])[1] > 7  # too large to be kept


def test_the_environment_has_precedence():
    kept, _ = renewed(["kept", "1000"], MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
