"""Ray clusters for tests."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import psutil
import pytest

from tests.support.forking import forks

# Workers that Ray starts with a node have no job's runtime environment, so that no job of ours would take them.
QUIET_RAY = {"prestart_worker_first_driver": False, "metrics_report_interval_ms": 1000}
# Nobody reads what this would send to drivers, nor statistics of nodes, which are taken every five seconds.
NO_LOG_MONITOR = {"include_log_monitor": False, "include_dashboard": False}
NO_STATISTICS = {"REPORTER_UPDATE_INTERVAL_MS": str(24 * 3600 * 1000)}
STORE_BYTES = 200 * 2**20
# Of runs whose workers hang: on a busy machine a healthy one may be without the processor for some seconds.
PATIENCE = "15s"


@contextmanager
def head(**options: Any) -> Iterator[Any]:
    """A cluster of Ray's `cluster_utils` on this machine, with a head of these options; its workers are forks."""
    with forks(), pytest.MonkeyPatch.context() as patch:
        for name, value in NO_STATISTICS.items():
            patch.setenv(name, value)
        from shardprune.cluster.ray_backend import ray  # with its settings

        from ray.cluster_utils import Cluster  # isort: skip

        started = Cluster(initialize_head=True, head_node_args={**NO_LOG_MONITOR, **options})
        try:
            yield started
        finally:
            ray.shutdown()
            started.shutdown()


@contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """The module `ray`, connected to a cluster of this machine with so many CPU slots."""
    with head(num_cpus=cpus, object_store_memory=STORE_BYTES, _system_config=QUIET_RAY) as started:
        from shardprune.cluster.ray_backend import WORKER_ENV, ray

        environment = {"env_vars": {name: os.environ[name] for name in WORKER_ENV}}
        ray.init(started.address, log_to_driver=False, runtime_env=environment)
        yield ray


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
                options = {"num_cpus": slots, "object_store_memory": STORE_BYTES, "_system_config": QUIET_RAY}
                started.append(opened.enter_context(head(**options)).address)
            return started[0] if started else ""

        yield address
