"""Pieces of work at the same time on one Ray cluster: each in a process of its own, with a share of the slots."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shardprune.cluster.group import Backend, Group, Slots
from shardprune.cluster.ray_backend import LOST
from shardprune.errors import WorkerLost, first_line
from shardprune.recovery.spec import TrainingSpec
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import ForwardSpec

T = TypeVar("T")


class Share:
    """A backend as one of `ways` pieces of work sees it that share its slots evenly."""

    concurrent = False

    def __init__(self, whole: Backend, ways: int) -> None:
        self._whole, self._ways = whole, ways
        self.replaces = whole.replaces

    def slots(self) -> Slots:
        return self._whole.slots().share(self._ways)

    def room(self, device: str) -> float:
        return self.slots().workers(device)

    def start(self, specs: Sequence[ForwardSpec], store_bytes: int, worker: type[ForwardWorker] = PruneWorker) -> Group:
        return self._whole.start(specs, store_bytes, worker)

    def train(self, spec: TrainingSpec, workers: int) -> list[dict[str, Any]]:
        return self._whole.train(spec, workers)

    def settle(self) -> Slots:
        return self._whole.settle().share(self._ways)

    def in_shares(self, calls: Sequence[Callable[[Backend], T]]) -> list[T]:
        raise AssertionError("a share is not shared again")

    def close(self) -> None:
        self._whole.close()


def in_shares(calls: Sequence[Callable[[Backend], T]], backend: Callable[[], Backend]) -> list[T]:
    """Make calls at the same time; return their results, or raise the first error when all are over.

    Each is made by an actor of its own on this node and not by a thread, which a signal could not end: what it has
    started ends with it. It is not a task either: Ray ends the driver where a task comes to its end while it is
    cancelled ("Tried to complete task that was not pending"), and an actor can be killed at any time.

    Args:
        backend: that makes the backend of the connected cluster in another process.

    Raises:
        WorkerLost: the process of a call died.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0)(_Caller).options(scheduling_strategy=here)
    callers = [actor.remote() for _ in calls]
    try:
        refs = [caller.make.remote(call, backend, len(calls)) for caller, call in zip(callers, calls, strict=True)]
        ray.wait(refs, num_returns=len(refs))
        return [ray.get(ref) for ref in refs]
    except RayTaskError as error:
        raise error.cause or error from error
    except LOST as error:
        raise WorkerLost(first_line(error)) from error
    finally:
        for caller in callers:
            ray.kill(caller)


class _Caller:
    """A process that makes one of the calls."""

    def make(self, call: Callable[[Backend], T], backend: Callable[[], Backend], ways: int) -> T:
        return call(Share(backend(), ways))
