"""Runs in this process that are cut off while they write a layer."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from shardprune.shard.prune_worker import PruneWorker


@contextmanager
def dying_at(layer: int) -> Iterator[None]:
    """Raise KeyboardInterrupt in place of the first writing of a layer, as Ctrl-C would."""
    write, dead = PruneWorker.write, False

    @functools.wraps(write)
    def failing(self, index, record):
        nonlocal dead
        if index == layer and not dead:
            dead = True
            raise KeyboardInterrupt
        return write(self, index, record)

    with mock.patch.object(PruneWorker, "write", failing):
        yield
