"""Tensors through a process group of real processes: the same bits as sums of whole parts, and a peer that is lost."""

import os
import signal
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from shardprune.errors import WorkerLost
from shardprune.shard import peers as exchange
from shardprune.shard.peers import HeldTensor, Peers

RANKS = 4
SOME = ([0, 1, 2, 3], [1, 3], [2, 0, 1])  # ranks of a chain, in its order
COLS = 9


def part_of(rank: int) -> torch.Tensor:
    """Sums of a rank whose order of addition shows in the last bits, with a negative zero among them."""
    sums = torch.randn(COLS, COLS, generator=torch.Generator().manual_seed(rank)) * 10.0**rank
    sums[0, 0] = -0.0
    return sums


def merged(ranks: list[int]) -> torch.Tensor:
    """The sums of all ranks as whole parts that the object store would bring."""
    total = torch.zeros(COLS, COLS)
    for rank in ranks:
        total += part_of(rank)
    return total


def sums_and_projections(peers: Peers) -> None:
    for ranks in SOME:
        for end in ranks:
            sums, weight = part_of(peers.rank), part_of(peers.rank)
            if peers.rank in ranks:
                for columns in (slice(0, 4), slice(4, COLS), slice(COLS, COLS)):  # not contiguous; the last is empty
                    peers.sum_up(sums[:, columns], ranks, end)
                    peers.broadcast(weight[:, columns], ranks, end)
            expected = merged(ranks) if peers.rank == end else part_of(peers.rank)
            assert same_bits(sums, expected), (ranks, end)
            assert same_bits(weight, part_of(end if peers.rank in ranks else peers.rank)), (ranks, end)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def waves(peers: Peers) -> None:
    """Rank 0 has more waves on their way to rank 1 than a sender holds; bfloat16, and one that stays."""
    for key in range(8):
        wave = torch.full((2, 3, 5), float(key), dtype=torch.bfloat16)
        held = HeldTensor(key, 0, (2, 3, 5), torch.bfloat16)
        if peers.rank == 0:
            assert peers.hold(key, wave) == held
            peers.send(held, 1)
        if peers.rank == 1:
            assert torch.equal(peers.take(held), wave)
    own = torch.arange(3)
    assert peers.take(peers.hold(9, own)) is own


def a_lost_peer(peers: Peers) -> None:
    """Rank 2 dies in the middle of a chain, when all have begun it."""
    tensor = torch.ones(10**6)
    exchange.PIECE_BYTES = 2**16
    if peers.rank == 2:
        transfers = []

        def dies(operations: list[dist.P2POp]) -> None:
            transfers.append(operations)
            if len(transfers) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            Peers._transfer(peers, operations)

        peers._transfer = dies  # type: ignore[method-assign]
    with pytest.raises(WorkerLost, match=rf"rank {peers.rank} lost a peer in an exchange: .*"):
        peers.sum_up(tensor, range(RANKS), 0)
    assert isinstance(peers.failure, WorkerLost)


def too_little_memory(peers: Peers) -> None:
    """What a device says is no lost peer, and is kept for a driver that waits for another participant."""
    for error in (torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("illegal memory access")):
        with pytest.raises(type(error)), peers._exchange():
            raise error
        assert peers.failure is error


def run(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    peers = Peers(rank, RANKS, store, torch.device("cpu"))
    for piece in (40, 2**20):  # many, the last one shorter, and one
        exchange.PIECE_BYTES = piece
        sums_and_projections(peers)
    waves(peers)
    too_little_memory(peers)
    dist.barrier()
    a_lost_peer(peers)


def test_chains_give_the_bits_of_whole_parts_waves_arrive_and_a_lost_peer_ends_the_exchange_of_all_others():
    """Each rank is a process that does one after the other; its exit code is 1 where something is not so."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    spawned = mp.spawn(run, (store.port,), nprocs=RANKS, join=False)
    killers = [threading.Timer(120, process.kill) for process in spawned.processes]
    for process, killer in zip(spawned.processes, killers, strict=True):
        killer.start()
        process.join()
        killer.cancel()
    assert [process.exitcode for process in spawned.processes] == [0, 0, -signal.SIGKILL, 0]
