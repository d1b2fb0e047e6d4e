"""Waves on their way through the shards: dense observation and the measuring of perplexity.

Resident shards work as a pipeline: while shard 2 has wave 1, shard 1 has wave 2. Streamed shards take
all waves first and then read each of their layers once.
"""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shardprune.cluster.group import Group, Ref, flow
from shardprune.cluster.layout import Layout
from shardprune.progress import Step
from shardprune.shard.layers import Version
from shardprune.shard.waves import Wave, waves_of
from shardprune.shard.worker import segment_stream

IN_FLIGHT = 3  # waves under way to or on a worker, at most


class Waves:
    """A run's window tensor [samples, seqlen] as waves over the replicas."""

    def __init__(self, tokens: Tensor, replicas: int, size: int) -> None:
        self.tokens = tokens
        self.all: list[Wave] = waves_of(len(tokens), replicas, size)

    def windows(self, wave: Wave) -> Tensor:
        """The tokens [wave, seqlen] of one wave."""
        return self.tokens[wave.start : wave.stop]

    def in_turn(self) -> list[Wave]:
        """The waves in the order of sending: every replica gets one before any gets its next."""
        seen: dict[int, int] = {}
        turns = []
        for wave in self.all:
            seen[wave.replica] = turn = seen.get(wave.replica, -1) + 1
            turns.append((turn, wave.replica, wave))
        return [wave for _, _, wave in sorted(turns, key=lambda item: item[:2])]


def perplexity(group: Group, layout: Layout, waves: Waves, version: Version, streamed: bool, step: Step) -> float:
    """exp of the mean token loss over all windows, of the dense or the latest model."""
    last, stop = len(layout.shards) - 1, layout.shards[-1].stop
    order = waves.in_turn()
    arrived: Iterator[Ref]
    if streamed:
        stream = "evaluation"
        _layer_by_layer(group, layout, waves, stream, version, (), stop, step)
        arrived = (group.submit(last, wave.replica, "take", stream, wave.index) for wave in order)
    else:
        arrived = _pipeline(group, layout, waves, version, (), stop)
    losses = (
        group.submit(last, wave.replica, "losses", hidden, waves.windows(wave))
        for wave, hidden in zip(order, arrived, strict=True)
    )
    sums: dict[int, list[float]] = {}
    for wave, values in zip(order, flow(group, losses, in_flight(layout)), strict=True):
        sums[wave.index] = values
        step.advance()
    release(group, layout)
    total = sum(value for index in sorted(sums) for value in sums[index])
    return math.exp(total / (len(waves.tokens) * (waves.tokens.shape[1] - 1)))


def parts_of_perplexity(waves: Waves, layers: int, streamed: bool) -> int:
    """The number of parts that `perplexity` reports to its progress step."""
    return len(waves.all) * (1 + (layers if streamed else 0))


def observe(group: Group, layout: Layout, waves: Waves, firsts: tuple[int, ...], streamed: bool, step: Step) -> None:
    """Send the dense calibration waves through, and keep what enters each layer in `firsts` where it lies."""
    stop = max(firsts)
    last = layout.shard_of(stop)
    if streamed:
        stream = "observation"
        _layer_by_layer(group, layout, waves, stream, "dense", firsts, stop, step)
        to_all(group, layout, last, "drop", stream)
    else:
        arrived = _pipeline(group, layout, waves, "dense", firsts, stop)
        discarded = (
            group.submit(last, wave.replica, "discard", hidden)
            for wave, hidden in zip(waves.in_turn(), arrived, strict=True)
        )
        for _ in flow(group, discarded, in_flight(layout)):
            step.advance()
    release(group, layout)


def parts_of_observing(waves: Waves, firsts: tuple[int, ...], streamed: bool) -> int:
    """The number of parts that `observe` reports to its progress step."""
    return len(waves.all) * (max(firsts) if streamed else 1)


def enter(group: Group, layout: Layout, waves: Waves, stream: str) -> None:
    """Embed all waves and keep them on the first shard under the name of a stream."""
    _relay(group, layout, waves, stream, None, 0)
    to_all(group, layout, 0, "release")


def hand_on(group: Group, layout: Layout, waves: Waves, stream: str, shard: int) -> None:
    """Move all kept waves of a stream from a shard to the next."""
    _relay(group, layout, waves, stream, shard, shard + 1)


def release(group: Group, layout: Layout) -> None:
    """Let every worker give back what only the pass needed."""
    for shard in range(len(layout.shards)):
        to_all(group, layout, shard, "release")


def in_flight(layout: Layout) -> int:
    """How many waves may be under way in all: a few on every worker of a pipeline."""
    return IN_FLIGHT * layout.replicas + len(layout.shards) - 1


def _pipeline(
    group: Group, layout: Layout, waves: Waves, version: Version, record: tuple[int, ...], stop: int
) -> Iterator[Ref]:
    """Send every wave through all layers below `stop`, one wave behind the other; yield what comes out.

    What enters a layer in `record` is kept there as the stream of the segment that it starts.
    """
    for wave in waves.in_turn():
        hidden = group.submit(0, wave.replica, "embed", waves.windows(wave))
        for shard in _shards_up_to(layout, stop):
            hidden = group.submit(shard, wave.replica, "forward", wave.index, hidden, version, record, stop)
        yield hidden


def _layer_by_layer(
    group: Group,
    layout: Layout,
    waves: Waves,
    stream: str,
    version: Version,
    record: tuple[int, ...],
    stop: int,
    step: Step,
) -> None:
    """Send all waves through one layer after another below `stop`; what comes out stays on the last shard.

    What enters a layer in `record` is kept there as the stream of the segment that it starts.
    """
    enter(group, layout, waves, stream)
    shards = _shards_up_to(layout, stop)
    for shard in shards:
        for index in layout.shards[shard]:
            if index in record:
                to_all(group, layout, shard, "fork", stream, segment_stream(index))
            if index < stop:
                for _ in to_waves(group, layout, waves, shard, "propagate", stream, index, version):
                    step.advance()
        if shard != shards[-1]:
            hand_on(group, layout, waves, stream, shard)


def _shards_up_to(layout: Layout, stop: int) -> list[int]:
    """The shards whose layers a pass that ends before layer `stop` reaches, that of `stop` included."""
    return [index for index, shard in enumerate(layout.shards) if shard.start <= stop]


def to_waves(
    group: Group, layout: Layout, waves: Waves, shard: int, verb: str, stream: str, *args: Any
) -> Iterator[Any]:
    """Call a verb of a shard's workers for every wave that they keep of a stream; yield as they finish."""
    refs = (group.submit(shard, wave.replica, verb, stream, wave.index, *args) for wave in waves.in_turn())
    return flow(group, refs, in_flight(layout))


def to_all(group: Group, layout: Layout, shard: int, verb: str, *args: Any) -> list[Any]:
    """Call a verb of all replicas of a shard and wait for them."""
    return [group.get(ref) for ref in [group.submit(shard, r, verb, *args) for r in range(layout.replicas)]]


def _relay(group: Group, layout: Layout, waves: Waves, stream: str, source: int | None, target: int) -> None:
    """Bring all waves to a shard, from the tokens or from another shard."""

    def move(wave: Wave) -> Ref:
        if source is None:
            hidden = group.submit(0, wave.replica, "embed", waves.windows(wave))
        else:
            hidden = group.submit(source, wave.replica, "take", stream, wave.index)
        return group.submit(target, wave.replica, "put", stream, wave.index, hidden)

    for _ in flow(group, (move(wave) for wave in waves.in_turn()), in_flight(layout)):
        pass
