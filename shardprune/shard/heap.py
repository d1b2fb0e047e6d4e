"""The heap of a process that computes on a CPU: blocks that tensors have freed are kept for the next ones."""

import ctypes
import os

# glibc gives freed blocks back to the kernel, and its next one is zeroed anew: 10 to 20 % of the CPU time of pruning
# small models. It keeps those of MMAPPED bytes at most now, and KEPT bytes of them at the end of the heap. A larger
# block is worth a system call of its own, and leaves no hole.
MMAPPED, KEPT = 64 * 2**20, 256 * 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_blocks() -> bool:
    """Keep freed blocks in this process, where its environment does not set up the heap; return whether they are.

    Other C libraries than glibc have no such setting, and stay as they are.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of this process
        return False
    return all([mallopt(M_MMAP_THRESHOLD, MMAPPED), mallopt(M_TRIM_THRESHOLD, KEPT)])
