"""Workers in this process, each call carried out at once: for one GPU, a notebook, a debugger."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from shardprune.cluster.group import Backend, Group, Ref, Slots, this_machine
from shardprune.recovery.spec import TrainingSpec
from shardprune.recovery.worker import alone, train_worker
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import ForwardSpec

T = TypeVar("T")


class LocalGroup:
    """Workers [shard][replica] without processes of their own."""

    concurrent = False

    def __init__(self, specs: Sequence[ForwardSpec], worker: type[ForwardWorker]) -> None:
        self._threads = torch.get_num_threads()  # the caller's, which workers change
        self._workers = {(spec.shard, spec.replica): worker(spec) for spec in specs}

    def submit(self, shard: int, replica: int, verb: Callable[..., T], *args: Any) -> Ref[T]:
        return getattr(self._workers[shard, replica], verb.__name__)(*args)

    def get(self, ref: Ref[T]) -> T:
        return cast(T, ref)  # a call is done when it is submitted: its reference is its value

    def ranks(self, shard: int, replicas: Sequence[int]) -> None:
        return None

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        torch.set_num_threads(self._threads)


class LocalBackend:
    """This process on this machine."""

    replaces = False
    concurrent = False

    def slots(self) -> Slots:
        machine = this_machine()
        return replace(machine, gpus=min(1, machine.gpus))  # one process works on one GPU

    def room(self, device: str) -> float:
        return math.inf

    def start(self, specs: Sequence[ForwardSpec], store_bytes: int, worker: type[ForwardWorker] = PruneWorker) -> Group:
        return LocalGroup(specs, worker)

    def train(self, spec: TrainingSpec, workers: int) -> list[dict[str, Any]]:
        device = spec.recipe.device
        with alone(device):
            return [train_worker(spec, torch.device("cuda", 0) if device == "cuda" else torch.device(device))]

    def settle(self) -> Slots:
        raise AssertionError("a worker of this process cannot be replaced")

    def in_shares(self, calls: Sequence[Callable[[Backend], T]]) -> list[T]:
        raise AssertionError("this process does one thing at a time")

    def close(self) -> None:
        pass
