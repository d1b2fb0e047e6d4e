"""Workers as the driver sees them: call a verb, get a reference, pass the reference on, wait for its value."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from shardprune.errors import InputError
from shardprune.recovery.spec import TrainingSpec
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.spec import ForwardSpec

T = TypeVar("T")


class Ref(Generic[T]):
    """A reference to a value of type T on a worker; `Group.get` waits for it.

    Only a name for type checkers: every group has references of its own (Ray's object references, the values themselves
    where all is one process).
    """


class Group(Protocol):
    """Workers [shard][replica].

    Calls to one worker run in the order of their submission. Arguments are positional, and a reference
    among them arrives as its value.
    """

    concurrent: bool  # whether different workers work at the same time

    def submit(self, shard: int, replica: int, verb: Callable[..., T], *args: Any) -> Ref[T]:
        """Call a method of a worker, such as `PruneWorker.solve`, with everything after `self`.

        The worker's own class decides which method of that name it is, as in every call of a method.
        """

    def get(self, ref: Ref[T]) -> T:
        """Return the value of a reference.

        Raises:
            WorkerLost: the worker or its node died.
        """

    def ranks(self, shard: int, replicas: Sequence[int]) -> tuple[int, ...] | None:
        """Return the ranks of workers in the process group of all; None where there is none and tensors travel as
        arguments.

        Verbs that take `ranks` are called for all of them in one go, by one thread: see `shardprune.shard.peers`.
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class Slots:
    """CPUs and GPUs of all living nodes of a machine or cluster, and the most CPUs that one node has."""

    cpus: int
    gpus: int
    cpus_of_a_node: int

    def workers(self, device: str) -> int:
        """Return how many workers fit: one per GPU, or one per CPU."""
        return self.gpus if device == "cuda" else self.cpus

    def share(self, ways: int) -> "Slots":
        """Return the slots of each of so many pieces of work that share them evenly."""
        # Also of the largest node's CPUs: workers with more threads than that may find no place at the same time.
        return Slots(self.cpus // ways, self.gpus // ways, max(1, self.cpus_of_a_node // ways))


def this_machine() -> Slots:
    """Return the slots of the machine that this process runs on."""
    # A scheduler may allow this process fewer CPUs than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Slots(cpus, torch.cuda.device_count(), cpus)


class Backend(Protocol):
    """A source of workers."""

    replaces: bool  # whether others can take the place of lost workers
    concurrent: bool  # whether pieces of work can share its slots

    def slots(self) -> Slots:
        """Return the slots for workers.

        Raises:
            InputError: the cluster cannot be reached.
        """

    def room(self, device: str) -> float:
        """Return how many workers can work at once; infinity where they take turns, or get the slots that they need.

        Raises:
            InputError: the cluster cannot be reached.
        """

    def start(self, specs: Sequence[ForwardSpec], store_bytes: int, worker: type[ForwardWorker] = PruneWorker) -> Group:
        """Start workers of a class; `store_bytes` is the memory for tensors under way between them.

        Raises:
            InputError: the cluster does not free what they need.
            WorkerLost: one died while it started.
        """

    def train(self, spec: TrainingSpec, workers: int) -> list[dict[str, Any]]:
        """Fine-tune with so many processes; return the usage of each.

        Raises:
            WorkerLost: a worker or its node died.
        """

    def settle(self) -> Slots:
        """Wait, after a worker was lost, until every dead node is known; return the slots that are left."""

    def in_shares(self, calls: Sequence[Callable[["Backend"], T]]) -> list[T]:
        """Make calls at the same time, each with a backend that has an equal share of the slots; return their results.

        Only where it is `concurrent`. Calls and results are sent to other processes and back.

        Raises:
            WorkerLost: the process of a call died.
        """

    def close(self) -> None: ...


def check_room(backend: Backend, workers: int, device: str, field: str = "shards") -> None:
    """Raise an error where so many workers, which `field` of a recipe asks for, cannot work at once.

    Raises:
        InputError: there are fewer slots.
    """
    room = backend.room(device)
    if workers > room:
        units = "GPUs" if device == "cuda" else "CPUs"
        raise InputError(field, f"{workers} workers need as many {units}; the cluster has {room:g}")


def flow(group: Group, refs: Iterable[Ref[T]], in_flight: int) -> Iterator[T]:
    """Yield the values of references in their order, with at most `in_flight` calls unfinished at any time.

    `refs` is an iterator that submits a call with every step, so that not stepping on holds work back.
    """
    limit = in_flight if group.concurrent else 1
    window: deque[Ref[T]] = deque()
    for ref in refs:
        window.append(ref)
        if len(window) >= limit:
            yield group.get(window.popleft())
    while window:
        yield group.get(window.popleft())


class ReplicaSubset:
    """Some of the replicas of a group, as a group of its own: workers [shard][member]."""

    def __init__(self, group: Group, members: Sequence[int]) -> None:
        self.concurrent = group.concurrent
        self.members = tuple(members)
        self._group = group

    def submit(self, shard: int, replica: int, verb: Callable[..., T], *args: Any) -> Ref[T]:
        return self._group.submit(shard, self.members[replica], verb, *args)

    def get(self, ref: Ref[T]) -> T:
        return self._group.get(ref)

    def ranks(self, shard: int, replicas: Sequence[int]) -> tuple[int, ...] | None:
        return self._group.ranks(shard, [self.members[replica] for replica in replicas])

    def close(self) -> None:
        self._group.close()
