"""Lanes: pieces of a driver's work for different workers, which go side by side."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from shardprune.cluster.group import Group
from shardprune.signals import as_completed

T = TypeVar("T")


def side_by_side(group: Group, lanes: Sequence[Callable[[], T]]) -> list[T]:
    """Carry out all lanes, which share no worker, at the same time where workers do; return their values in order.

    Raises:
        WorkerLost: a worker died. All workers are closed then, so that no lane goes on alone; so they are if a lane
            ends with any other error.
    """
    if not group.concurrent:
        return [lane() for lane in lanes]
    with ThreadPoolExecutor(max_workers=len(lanes)) as pool:
        try:
            going = [pool.submit(lane) for lane in lanes]
            for future in as_completed(going):
                future.result()
            return [future.result() for future in going]
        except BaseException:
            group.close()
            raise
