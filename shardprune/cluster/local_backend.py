"""Workers of this process, each call done at once: for one GPU, a notebook, a debugger."""

from typing import Any

from shardprune.cluster.group import Group, Ref, Slots, this_machine
from shardprune.errors import WorkerLost
from shardprune.shard.worker import ShardWorker, WorkerSpec


class LocalGroup:
    """Workers [shard][replica] without processes of their own."""

    concurrent = False

    def __init__(self, specs: list[WorkerSpec]) -> None:
        self._workers = {(spec.shard, spec.replica): ShardWorker(spec) for spec in specs}

    def submit(self, shard: int, replica: int, verb: str, *args: Any) -> Ref:
        return getattr(self._workers[shard, replica], verb)(*args)

    def get(self, ref: Ref) -> Any:
        return ref

    def close(self) -> None:
        self._workers.clear()


class LocalBackend:
    """This process on this machine."""

    def slots(self) -> Slots:
        return this_machine()

    def start(self, specs: list[WorkerSpec], store_bytes: int) -> Group:
        return LocalGroup(specs)

    def settle(self) -> Slots:
        raise WorkerLost("a worker of this process cannot be replaced")

    def close(self) -> None:
        pass
