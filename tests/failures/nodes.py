"""Ray clusters of several nodes on this machine, whose actors and nodes can be killed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.support.clusters import NO_LOG_MONITOR, QUIET_RAY, head, kill, processes_of

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, **NO_LOG_MONITOR}
# Ray's own are 30 s and more until a node that is gone counts as dead.
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
    **QUIET_RAY,
}


class Nodes:
    """A cluster whose head has no slot and whose nodes have one each."""

    def __init__(self, cluster: Any, count: int) -> None:
        self._cluster = cluster
        self._nodes = [cluster.add_node(**NODE) for _ in range(count)]
        self.count = count
        self.address: str = cluster.address

    def kill_node(self) -> None:
        """Kill all processes of one node, which has a worker if all have.

        Its workers are forks, which Ray does not kill with their node: they would see that it is gone a little later.
        """
        node = self._nodes.pop(0)
        workers = _workers_on(node.node_id)
        self._cluster.remove_node(node, allow_graceful=False)
        for process in workers:
            kill(process)

    def repair(self) -> None:
        """Add nodes until there are as many as at the start."""
        while len(self._nodes) < self.count:
            self._nodes.append(self._cluster.add_node(**NODE))

    def kill_actor(self) -> None:
        """Kill the process of one worker."""
        workers = self.workers()
        assert workers, "there is no worker to kill"
        workers[-1].send_signal(signal.SIGKILL)

    def workers(self) -> list[psutil.Process]:
        """The processes of the workers on all nodes."""
        return processes_of("PruneActor")


def _workers_on(node_id: str) -> list[psutil.Process]:
    """The processes of a node's workers, none where this process is not connected yet."""
    import ray
    from ray._private import state

    actors = state.actors().values() if ray.is_initialized() else ()
    return [
        psutil.Process(actor["Pid"])
        for actor in actors
        if actor["Address"]["NodeID"] == node_id and actor["State"] == "ALIVE"
    ]


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    """A cluster of so many one-slot nodes, to which this process connects run by run."""
    with head(**{**NODE, "num_cpus": 0}, _system_config=QUICK) as cluster:
        yield Nodes(cluster, count)
