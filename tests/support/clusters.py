"""Ray clusters for tests."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from tests.support.forking import forks

# Those that Ray starts with a node have no job's runtime environment, so that no job of ours would take them.
NO_SPARE_WORKERS = {"prestart_worker_first_driver": False}


@contextmanager
def cluster(cpus: int, store: int = 200 * 2**20) -> Iterator[Any]:
    """The module `ray`, connected to a cluster of this machine with so many CPU slots and bytes of object store."""
    from shardprune.cluster.ray_backend import ray

    with forks():
        ray.init(
            "local",
            num_cpus=cpus,
            object_store_memory=store,
            include_dashboard=False,
            _system_config={"metrics_report_interval_ms": 500, **NO_SPARE_WORKERS},
            log_to_driver=False,
            runtime_env={"env_vars": {"RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1"}},
        )
        yield ray
        ray.shutdown()


def processes_of(*actors: str) -> list[psutil.Process]:
    """The processes of actors of these classes in all clusters that this process started; others come and go."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if any(f"ray::{actor}" in title for actor in actors):
                found.append(process)
    return found


def kill(process: psutil.Process) -> None:
    """Kill a process, which may be gone by itself."""
    with suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGKILL)
