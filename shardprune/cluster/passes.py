"""Passes of waves through the shards, and perplexity.

Resident shards work as a pipeline: while shard 2 has wave 1, shard 1 has wave 2. Streamed shards take
all waves first and then read each of their layers once.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from typing import Any, TypeVar

from torch import Tensor

from shardprune.cluster.group import Group, Ref, flow
from shardprune.cluster.layout import Layout
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker, segment_stream
from shardprune.shard.layers import Version
from shardprune.shard.likelihoods import perplexity_of
from shardprune.shard.waves import Wave, waves_of

T = TypeVar("T")

IN_FLIGHT = 3  # waves under way to or on a worker, at most


class Waves:
    """A run's window tensor [samples, seqlen] as waves over the replicas.

    The last windows may be `held_out`: they are waves of their own, behind the others.
    """

    def __init__(self, tokens: Tensor, replicas: int, size: int, held_out: int = 0) -> None:
        self.tokens = tokens
        self._seen = len(tokens) - held_out  # windows that are not held out
        self.all: list[Wave] = waves_of(self._seen, replicas, size)
        for wave in waves_of(held_out, replicas, size):
            start, stop = wave.start + self._seen, wave.stop + self._seen
            self.all.append(Wave(len(self.all), wave.replica, start, stop))

    @property
    def calibrating(self) -> "Waves":
        """The waves that are not held out."""
        return self._of([wave for wave in self.all if wave.stop <= self._seen])

    @property
    def held_out(self) -> "Waves":
        """The waves that are held out."""
        return self._of([wave for wave in self.all if wave.start >= self._seen])

    def _of(self, waves: list[Wave]) -> "Waves":
        chosen = copy(self)
        chosen.all = waves
        return chosen

    @property
    def tokens_of_one(self) -> int:
        """The number of tokens of a wave, of the largest where they differ."""
        return max(wave.stop - wave.start for wave in self.all) * self.tokens.shape[1]

    def windows(self, wave: Wave) -> Tensor:
        """Return the tokens [wave, seqlen] of one wave."""
        return self.tokens[wave.start : wave.stop]

    def in_turn(self) -> list[Wave]:
        """Return the waves in the order of sending: every replica gets one before any gets its next."""
        seen: dict[int, int] = {}
        turns = []
        for wave in self.all:
            seen[wave.replica] = turn = seen.get(wave.replica, -1) + 1
            turns.append((turn, wave.replica, wave))
        return [wave for _, _, wave in sorted(turns, key=lambda item: item[:2])]


def perplexity(group: Group, layout: Layout, waves: Waves, version: Version, streamed: bool, step: Step) -> float:
    """Return the perplexity of a version of the model: exp of the mean token loss over all windows."""
    arrived = through_all_layers(group, layout, waves, version, streamed, step)
    sums = dict(judged(group, layout, arrived, ForwardWorker.losses, waves.windows, step))
    total = sum(value for values in in_wave_order(sums) for value in values)
    return perplexity_of(total / (len(waves.tokens) * (waves.tokens.shape[1] - 1)))


def through_all_layers(
    group: Group,
    layout: Layout,
    waves: Waves,
    version: Version,
    streamed: bool,
    step: Step,
    record: tuple[int, ...] = (),
) -> Iterator[tuple[Wave, Ref[Tensor]]]:
    """Send every wave through the model; yield each with the last layer's output. `record` as in `pipeline`."""
    last, stop = len(layout.shards) - 1, layout.stop
    order = waves.in_turn()
    arrived: Iterator[Ref[Tensor]]
    if streamed:
        stream = "evaluation"
        for _ in layer_by_layer(group, layout, waves, stream, version, record, stop, step):
            pass
        arrived = (group.submit(last, wave.replica, ForwardWorker.take, stream, wave.index) for wave in order)
    else:
        arrived = pipeline(group, layout, waves, version, record, stop)
    return zip(order, arrived, strict=True)


def judged(
    group: Group,
    layout: Layout,
    arrived: Iterator[tuple[Wave, Ref[Tensor]]],
    verb: Callable[..., T],
    target: Callable[[Wave], Any],
    step: Step,
) -> Iterator[tuple[int, T]]:
    """Call a verb of the last shard with the last layer's output and a wave's `target`; yield each wave's index with
    the value, and release the workers after the last one."""
    under_way: deque[int] = deque()

    def submitted() -> Iterator[Ref[T]]:
        for wave, hidden in arrived:
            under_way.append(wave.index)
            yield group.submit(len(layout.shards) - 1, wave.replica, verb, hidden, target(wave))

    for value in flow(group, submitted(), in_flight(layout)):
        yield under_way.popleft(), value
        step.advance()
    release(group, layout)
    account(group, layout, range(len(layout.shards)), step.record)


def in_wave_order(values: Mapping[int, T]) -> list[T]:
    """Return one value of each wave in the order of the waves, from values by their indices.

    Waves finish in any order, and a sum of floating-point numbers depends on its order.
    """
    return [values[index] for index in sorted(values)]


def parts_of_pass(waves: Waves, layers: int, streamed: bool) -> int:
    """Return the number of parts that a pass through all layers reports to its progress step."""
    return len(waves.all) * (1 + (layers if streamed else 0))


def load(group: Group, layout: Layout, version: Version) -> None:
    """Let all workers read their layers at the same time."""
    workers = [(shard, replica) for shard in range(len(layout.shards)) for replica in range(layout.replicas)]
    for ref in [group.submit(shard, replica, ForwardWorker.load, version) for shard, replica in workers]:
        group.get(ref)


def enter(group: Group, layout: Layout, waves: Waves, stream: str) -> None:
    """Embed all waves and keep them on the first shard under the name of a stream."""
    _relay(group, layout, waves, stream, None, 0)
    to_all(group, layout, 0, ForwardWorker.release)


def hand_on(group: Group, layout: Layout, waves: Waves, stream: str, shard: int) -> None:
    """Move all kept waves of a stream from a shard to the next."""
    _relay(group, layout, waves, stream, shard, shard + 1)


def hand_back(group: Group, layout: Layout, waves: Waves, stream: str, shard: int) -> None:
    """Move all kept waves of a stream from a shard to the one before it."""
    _relay(group, layout, waves, stream, shard, shard - 1)


def release(group: Group, layout: Layout) -> None:
    """Let every worker free what only the pass needed."""
    for shard in range(len(layout.shards)):
        to_all(group, layout, shard, ForwardWorker.release)


def account(group: Group, layout: Layout, shards: Iterable[int], record: Callable[..., None]) -> None:
    """Record the calls of the workers of some shards since the last account.

    Args:
        record: takes the event `work` and its fields.
    """
    for shard in shards:
        for replica, spans in enumerate(to_all(group, layout, shard, ForwardWorker.account)):
            if spans:
                record("work", shard=shard, replica=replica, spans=[span.plain() for span in spans])


def usage(group: Group, layout: Layout) -> list[dict[str, Any]]:
    """Return where every worker ran, and its peak memory and seconds."""
    workers = [(shard, replica) for shard in range(len(layout.shards)) for replica in range(layout.replicas)]
    return [group.get(group.submit(shard, replica, ForwardWorker.usage)) for shard, replica in workers]


def digests(group: Group, layout: Layout) -> list[dict[str, dict[str, str]]]:
    """Return, of every worker, the digests of the tensors that it has read since the last call."""
    workers = [(shard, replica) for shard in range(len(layout.shards)) for replica in range(layout.replicas)]
    return [group.get(group.submit(shard, replica, ForwardWorker.digests)) for shard, replica in workers]


def in_flight(layout: Layout) -> int:
    """Return how many waves may be under way in all: a few on every worker of a pipeline."""
    return IN_FLIGHT * layout.replicas + len(layout.shards) - 1


def pipeline(
    group: Group,
    layout: Layout,
    waves: Waves,
    version: Version,
    record: tuple[int, ...],
    stop: int,
    observed: bool = False,
) -> Iterator[Ref[Tensor]]:
    """Send every wave through all layers below `stop`, one wave behind the other; yield the last one's outputs.

    The inputs of a layer in `record` are kept there as the stream of the segment that it starts. If `observed`, the
    inputs of all projections add to sums.
    """
    for wave in waves.in_turn():
        hidden = group.submit(0, wave.replica, ForwardWorker.embed, waves.windows(wave))
        for shard in _shards_up_to(layout, stop):
            hidden = group.submit(
                shard, wave.replica, ForwardWorker.forward, wave.index, hidden, version, record, stop, observed
            )
        yield hidden


def layer_by_layer(
    group: Group,
    layout: Layout,
    waves: Waves,
    stream: str,
    version: Version,
    record: tuple[int, ...],
    stop: int,
    step: Step,
    observed: bool = False,
) -> Iterator[int]:
    """Send all waves through one layer after another below `stop`, and yield each layer when they are through; the
    outputs of the last one stay on its shard.

    `record` and `observed` as in `pipeline`.
    """
    enter(group, layout, waves, stream)
    shards = _shards_up_to(layout, stop)
    for shard in shards:
        for index in layout.shards[shard]:
            if index in record:
                to_all(group, layout, shard, ForwardWorker.fork, stream, segment_stream(index))
            if index < stop:
                for _ in to_waves(
                    group, layout, waves, shard, ForwardWorker.propagate, stream, index, version, observed
                ):
                    step.advance()
                yield index
        if shard != shards[-1]:
            hand_on(group, layout, waves, stream, shard)


def _shards_up_to(layout: Layout, stop: int) -> list[int]:
    """The shards whose layers a pass that ends before layer `stop` reaches, that of `stop` included."""
    return [index for index, shard in enumerate(layout.shards) if shard[0] <= stop]


def to_waves(
    group: Group, layout: Layout, waves: Waves, shard: int, verb: Callable[..., T], stream: str, *args: Any
) -> Iterator[T]:
    """Call a verb of a shard's workers for every wave that they keep of a stream; yield the values."""
    refs = (group.submit(shard, wave.replica, verb, stream, wave.index, *args) for wave in waves.in_turn())
    return flow(group, refs, in_flight(layout))


def to_all(group: Group, layout: Layout, shard: int, verb: Callable[..., T], *args: Any) -> list[T]:
    """Call a verb of all replicas of a shard; return the values."""
    return [group.get(ref) for ref in [group.submit(shard, r, verb, *args) for r in range(layout.replicas)]]


def _relay(group: Group, layout: Layout, waves: Waves, stream: str, source: int | None, target: int) -> None:
    """Bring all waves to a shard, from the tokens or from another shard."""

    def move(wave: Wave) -> Ref[None]:
        if source is None:
            hidden = group.submit(0, wave.replica, ForwardWorker.embed, waves.windows(wave))
        else:
            hidden = group.submit(source, wave.replica, ForwardWorker.take, stream, wave.index)
        return group.submit(target, wave.replica, ForwardWorker.put, stream, wave.index, hidden)

    for _ in flow(group, (move(wave) for wave in waves.in_turn()), in_flight(layout)):
        pass
