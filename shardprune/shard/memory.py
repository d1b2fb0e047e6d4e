"""Memory of a worker's device: refuse a run that cannot fit before any weight is read, and measure the peak."""

import resource
from pathlib import Path

import torch

from shardprune.errors import InputError
from shardprune.shard.spec import Need
from shardprune.storage.host_memory import host_memory
from shardprune.storage.quantities import gigabytes

ESTIMATE_ERROR = 1.2  # estimates are within 20 %


def check_memory(need: Need, device: torch.device | str) -> None:
    """Raise an error where a device has too little memory for a worker.

    All of its memory counts, not what is free at the moment, and only what cannot fit even if the estimate is 20 % too
    high is refused: it could never have worked.

    Raises:
        InputError: names how many bytes are missing, and what would help.
    """
    room = memory_of(torch.device(device))
    if need.bytes > ESTIMATE_ERROR * room:
        missing = need.bytes - room
        raise InputError(
            "memory",
            f"a worker takes {gigabytes(need.bytes)} at its peak ({need.step}), and its {torch.device(device).type} "
            f"has {gigabytes(room)}: {gigabytes(missing)} are missing; {need.helps}",
        )


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that this process may use on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage, this does not count what the process was before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
