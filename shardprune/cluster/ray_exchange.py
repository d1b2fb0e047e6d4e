"""The process group of a run's Ray actors: how they join it, and how tensors that actors hold become arguments.

Ray carries what is called and small values; waves, sums and solved projections go through `shardprune.shard.peers`.
"""

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayTaskError

from shardprune.cluster.group import Ref
from shardprune.errors import InputError, first_line
from shardprune.shard.device_errors import device_errors
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.peers import HeldTensor, Peers, does_travel

JOIN_SECONDS = 120.0
PROBE_SECONDS = 10.0  # between two questions of a driver that waits, whether all workers still work
# Where the libraries look for the network interface that they connect by; NCCL takes a name as a prefix without the =.
INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}


class JoiningActor(ForwardWorker):
    """The part of a worker's actor that joins the process group and carries out calls with tensors that are held."""

    _store: dist.TCPStore

    def listen(self) -> tuple[str, int]:
        """Serve the addresses of all ranks; return the host and port."""
        host = ray.util.get_node_ip_address()
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        return host, self._store.port

    def join(self, rank: int, size: int, host: str, port: int) -> None:
        """Join the process group of `size` workers; returns when all have."""
        if interface := interface_of(ray.util.get_node_ip_address()):
            for variable, form in INTERFACES.items():
                os.environ.setdefault(variable, form.format(interface))
        store = dist.TCPStore(host, port, is_master=False)
        self.peers = Peers(rank, size, store, self.skeleton.device)

    def carry_out(self, verb: str, key: int | None, *args: Any) -> Any:
        """Call a verb with tensors that workers hold among its arguments; hold its result under a key, or return it."""
        assert self.peers is not None
        given = [self.receive(value) if isinstance(value, HeldTensor) else value for value in args]
        value = getattr(self, verb)(*given)
        return value if key is None else self.peers.hold(key, value)

    def check_peers(self) -> None:
        """Raise the error that an exchange ended with here, if any did."""
        assert self.peers is not None
        if self.peers.failure:
            with device_errors(lambda: f"{self.spec.label}, exchange"):
                raise self.peers.failure


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an IP address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)):
            return name
    return None


@dataclass(frozen=True)
class Held(Ref[Any]):
    """A reference to a tensor that the worker of a rank holds: Ray's reference to its `HeldTensor`."""

    ref: Any
    rank: int


class Exchange:
    """The process group as the driver sees it; workers have ranks in their order.

    Args:
        actors: all workers, by shard and replica.
        wait: waits for a call of one of them.

    Raises:
        InputError: they do not reach one another.
        ray.exceptions.RayActorError: one died.
    """

    def __init__(self, actors: Mapping[tuple[int, int], Any], wait: Callable[[Any], None]) -> None:
        self.ranks = {place: rank for rank, place in enumerate(actors)}
        self._actors = list(actors.values())
        self._keys = itertools.count()
        # A held tensor's journey is two calls, to its sender and to its receiver: where two threads of a driver work
        # with the same workers, both must meet these in the same order.
        self._together = threading.Lock()
        self._probes: dict[Any, int] = {}
        self._checked = time.monotonic()
        listening = self._actors[0].listen.remote()
        wait(listening)
        host, port = ray.get(listening)
        joining = [actor.join.remote(rank, len(actors), host, port) for rank, actor in enumerate(self._actors)]
        try:
            ray.get(joining, timeout=JOIN_SECONDS)
        except (RayTaskError, GetTimeoutError) as error:
            waited = isinstance(error, GetTimeoutError)
            reason = f"not all answer in {JOIN_SECONDS:g} s" if waited else first_line(error.cause)
            raise InputError(
                "exchange",
                f"'group': the workers do not reach one another at {host}: {reason}; use store, or name the network"
                f" interface that all nodes share in {' and '.join(INTERFACES)}",
            ) from error

    def submit(self, place: tuple[int, int], verb: Callable[..., Any], *args: Any) -> Any:
        """Call a verb of a worker; tensors that other workers hold are sent to it."""
        travels, rank = does_travel(verb), self.ranks[place]
        actor = self._actors[rank]
        if not travels and not any(isinstance(value, Held) for value in args):
            return getattr(actor, verb.__name__).remote(*args)
        with self._together:
            given = []
            for value in args:
                if isinstance(value, Held):
                    # Both calls wait for the one that makes the tensor: if it fails, neither is carried out.
                    if value.rank != rank:
                        self._actors[value.rank].send.remote(value.ref, rank)
                    value = value.ref
                given.append(value)
            if not travels:
                return actor.carry_out.remote(verb.__name__, None, *given)
            return Held(actor.carry_out.remote(verb.__name__, next(self._keys), *given), rank)

    def check(self) -> None:
        """Ask all workers whether an exchange has failed on them, and look at the answers that have come.

        What ends an exchange for one worker may leave the others waiting until they run into a timeout; on GPUs this is
        so when a worker dies. A worker that has not answered yet is not asked again.

        Raises:
            ray.exceptions.RayActorError: a worker died.
            ray.exceptions.RayTaskError: an exchange failed on a worker.
        """
        with self._together:
            if time.monotonic() - self._checked < PROBE_SECONDS:
                return
            self._checked = time.monotonic()
            asked = set(self._probes.values())
            for rank, actor in enumerate(self._actors):
                if rank not in asked:
                    self._probes[actor.check_peers.remote()] = rank
            answered, _ = ray.wait(list(self._probes), num_returns=len(self._probes), timeout=0)
            for probe in answered:
                del self._probes[probe]
        for probe in answered:
            ray.get(probe)
