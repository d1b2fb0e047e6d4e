"""The process group of a run's workers, as one of them sees it: tensors go from worker to worker without a driver.

NCCL carries them between GPUs, gloo between processes on CPUs. There is one communicator, and nothing on it but
point-to-point calls: pairs for waves, chains for sums and for solved projections.

No exchange can wait for ever on living peers. A driver submits an exchange to all its participants in one go, one
exchange after the other, and each worker carries its calls out in the order of their submission. So there is one order
of all exchanges that every worker's own order agrees with, and the first unfinished one in it has, or soon gets, all
its participants.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shardprune.errors import WorkerLost, first_line
from shardprune.shard.device_errors import context_is_dead, is_out_of_memory

TIMEOUT = timedelta(minutes=30)  # for a peer that is silent: solving one input of the largest models takes minutes
PIECE_BYTES = 16 * 2**20  # of a tensor along a chain: while one worker has a piece, the next has the one before
UNFINISHED_SENDS = 3  # whose waves a sender still holds in memory

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that waits on the worker of a rank, under a key, until a verb of that worker or another one takes it."""

    key: int
    rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def travels(method: F) -> F:
    """Mark a verb whose result is one tensor that goes to a worker and not to the driver."""
    method.travels = True  # type: ignore[attr-defined]
    return method


def does_travel(method: Callable[..., Any]) -> bool:
    """Return whether a verb is marked as one that `travels`."""
    return getattr(method, "travels", False)


class Peers:
    """This process as one rank of the process group of all workers.

    Args:
        store: that all ranks reach; nothing else is exchanged through it than addresses.
        device: of the tensors.

    Raises:
        RuntimeError: the ranks do not reach one another.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.failure: BaseException | None = None  # that an exchange ended with here, while peers may wait for it
        self._device = device
        self._held: dict[int, Tensor] = {}
        self._sending: deque[tuple[list[dist.Work], Tensor]] = deque()
        gpu = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else None
        self.backend = "nccl" if gpu else "gloo"
        # With `device_id`, NCCL connects all ranks now and later calls may be among some of them.
        dist.init_process_group(self.backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT, device_id=gpu)
        dist.all_reduce(torch.zeros(1, device=device))

    # -- waves: from one worker to another ----------------------------------------------------------------------

    def hold(self, key: int, tensor: Tensor) -> HeldTensor:
        """Hold a tensor under a key until it is taken."""
        self._held[key] = tensor
        return HeldTensor(key, self.rank, tuple(tensor.shape), tensor.dtype)

    def send(self, held: HeldTensor, to: int) -> None:
        """Send a tensor that is held here to another rank, which calls `take`; returns before it has arrived."""
        with self._exchange():
            tensor = self._held.pop(held.key)
            while len(self._sending) >= UNFINISHED_SENDS:
                self._finish(self._sending.popleft()[0])
            self._sending.append((dist.batch_isend_irecv([dist.P2POp(dist.isend, tensor, to)]), tensor))

    def take(self, held: HeldTensor) -> Tensor:
        """Return a tensor that is held here, or the one that its rank sends."""
        if held.rank == self.rank:
            return self._held.pop(held.key)
        with self._exchange():
            tensor = torch.empty(held.shape, dtype=held.dtype, device=self._device)
            self._transfer([dist.P2POp(dist.irecv, tensor, held.rank)])
        return tensor

    # -- chains: among several workers, all of which call the same method ---------------------------------------

    def sum_up(self, tensor: Tensor, ranks: Sequence[int], taker: int) -> None:
        """Make the tensor of the rank `taker` the sum of those of all `ranks`, added to zero in the order of `ranks`.

        The partial sum goes from rank to rank, piece by piece, and from the last one to the taker, so that every worker
        sends and receives the tensor once (the taker receives it twice), over the border of a node too. That order is
        the one of `Summed.merge`: the same bits. On other ranks than the taker the tensor stays as it is.
        """
        place, last = ranks.index(self.rank), len(ranks) - 1
        following = ranks[place + 1] if place < last else None if taker == self.rank else taker
        closing = taker == self.rank and place < last
        partial: dict[int, Tensor] = {}
        with self._exchange():
            pieces = self._pieces(tensor)
            for step in range(len(pieces) + last + 1):
                # In a step, the rank at a place of the chain sends piece `step - place`: received one step earlier.
                ours, theirs, summed = step - place, step - place + 1, step - last
                operations = []
                if place and 0 <= theirs < len(pieces):
                    partial[theirs] = self._room(pieces[theirs])
                    operations.append(dist.P2POp(dist.irecv, partial[theirs], ranks[place - 1]))
                if following is not None and 0 <= ours < len(pieces):
                    outgoing = partial.pop(ours) if place else (pieces[ours] + 0).contiguous()
                    operations.append(dist.P2POp(dist.isend, outgoing, following))
                if closing and 0 <= summed < len(pieces):
                    total = self._room(pieces[summed])
                    operations.append(dist.P2POp(dist.irecv, total, ranks[last]))
                self._transfer(operations)
                if closing and 0 <= summed < len(pieces):
                    pieces[summed].copy_(total)
                if theirs in partial:
                    partial[theirs] += pieces[theirs]
                    if following is None:
                        pieces[theirs].copy_(partial.pop(theirs))

    def broadcast(self, tensor: Tensor, ranks: Sequence[int], source: int) -> None:
        """Make the tensors of all `ranks` equal to that of the rank `source`.

        Pieces go from rank to rank, round from the source, so that every worker receives the tensor once and sends it
        once at most.
        """
        start = ranks.index(source)
        chain = [*ranks[start:], *ranks[:start]]
        place = chain.index(self.rank)
        with self._exchange():
            pieces = self._pieces(tensor)
            arrived = tensor
            for step in range(len(pieces) + 1):
                operations, outgoing = [], arrived
                if place and step < len(pieces):
                    arrived = self._room(pieces[step])
                    operations.append(dist.P2POp(dist.irecv, arrived, chain[place - 1]))
                if place + 1 < len(chain) and step:
                    outgoing = outgoing if place else pieces[step - 1].contiguous()
                    operations.append(dist.P2POp(dist.isend, outgoing, chain[place + 1]))
                self._transfer(operations)
                if place and step < len(pieces):
                    pieces[step].copy_(arrived)

    # -- inside -------------------------------------------------------------------------------------------------

    def _pieces(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of whole rows of a tensor, contiguous or not, of PIECE_BYTES or of one row; none of an empty tensor."""
        if not tensor.numel():
            return ()
        return tensor.split(max(1, PIECE_BYTES * len(tensor) // tensor.nbytes))

    def _room(self, piece: Tensor) -> Tensor:
        """Contiguous memory for a piece: nothing else can be sent and received."""
        return torch.empty(piece.shape, dtype=piece.dtype, device=piece.device)

    def _transfer(self, operations: list[dist.P2POp]) -> None:
        """Carry out sends and receives at once: none of them waits for another."""
        if operations:
            self._finish(dist.batch_isend_irecv(operations))

    def _finish(self, works: list[dist.Work]) -> None:
        """Wait for transfers: on the CPU for gloo, on the current stream for NCCL."""
        for work in works:
            work.wait()

    @contextmanager
    def _exchange(self) -> Any:
        """Keep the error that an exchange ends with, for a driver that waits for one of its other participants.

        Raises:
            WorkerLost: a peer died, or was silent for TIMEOUT.
        """
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error) or context_is_dead(error):
                self.failure = error
                raise
            self.failure = WorkerLost(f"rank {self.rank} lost a peer in an exchange: {first_line(error)}")
            raise self.failure from error
