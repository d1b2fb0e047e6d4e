"""Ray clusters for tests."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
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


@contextmanager
def slots_for_commands(slots: int) -> Iterator[Callable[[], str]]:
    """What commands in processes of their own need: they and their workers are forks, and the address of a cluster with
    so many slots, which is started when it is asked for."""
    with forks(), ExitStack() as opened:
        started: list[str] = []

        def address() -> str:
            if slots and not started:
                from ray.cluster_utils import Cluster

                head = {"num_cpus": slots, "object_store_memory": 200 * 2**20, "include_dashboard": False}
                system = {"metrics_report_interval_ms": 500, **NO_SPARE_WORKERS}
                cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": system})
                opened.callback(cluster.shutdown)
                started.append(cluster.address)
            return started[0] if started else ""

        yield address
