"""The memory of this machine that a process may use."""

import os
import resource
from pathlib import Path

GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of versions 2 and 1


def host_memory() -> int:
    """Return the bytes of memory that this process may use: what is installed, or less where a limit says so."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [installed, *(_limit(path) for path in GROUP_LIMITS)]
    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min([*(limit for limit in limits if limit), *([allowed] if allowed != resource.RLIM_INFINITY else [])])


def _limit(path: str) -> int | None:
    """The limit of this process's control group; None where there is no such file, or no limit in it."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
