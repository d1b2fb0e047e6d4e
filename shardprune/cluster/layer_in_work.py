"""A layer in work, as the driver sees it: its waves, and the replicas of its shard."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from shardprune.cluster.group import Group, Ref
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, to_waves
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.shard.improving_worker import ImprovingWorker

T = TypeVar("T")


@dataclass(frozen=True)
class LayerInWork:
    """One layer and the pass that is at it, whose waves are kept under the name `stream` on the layer's shard."""

    group: Group
    layout: Layout
    waves: Waves
    stream: str
    layer: int
    step: Step

    @property
    def shard(self) -> int:
        return self.layout.shard_of(self.layer)

    @property
    def calibrating(self) -> "LayerInWork":
        """The layer with the waves alone that are not held out."""
        return replace(self, waves=self.waves.calibrating)

    @property
    def held_out(self) -> "LayerInWork":
        """The layer with the waves alone that are held out."""
        return replace(self, waves=self.waves.held_out)

    @property
    def dense(self) -> "LayerInWork":
        """The layer with the dense model's activations as its waves."""
        return replace(self, stream=dense_stream(self.stream))

    @property
    def turn(self) -> int:
        """The replica that does what only one has to do for this layer: layers take turns."""
        return turn_of(self.layer, self.layout.replicas)

    def share_out(self, costs: Sequence[float]) -> list[int]:
        """Return the replica that does each of several pieces of work: the most costly first, to the replica that has
        least to do, from the layer's `turn` on."""
        replicas = range(self.layout.replicas)
        load = [0.0] * self.layout.replicas
        doing = [0] * len(costs)
        for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
            doing[place] = min(replicas, key=lambda one: (load[one], (one - self.turn) % len(replicas)))
            load[doing[place]] += costs[place]
        return doing

    def ask(self, replica: int, verb: Callable[..., T], *args: Any) -> Ref[T]:
        """Call a verb of one replica for this layer."""
        return self.group.submit(self.shard, replica, verb, self.layer, *args)

    def ask_all(self, verb: Callable[..., T], *args: Any) -> list[T]:
        """Call a verb of all replicas for this layer, and wait; return the values."""
        return self.wait([self.ask(replica, verb, *args) for replica in range(self.layout.replicas)])

    def others(self, replica: int) -> list[int]:
        """Return all replicas but one."""
        return [one for one in range(self.layout.replicas) if one != replica]

    def reduce(self, statistics: Mapping[str, int]) -> list[Ref[None]]:
        """Merge statistics of the layer, each at the replica given with its name; return references to wait for."""
        replicas = range(self.layout.replicas)
        if len(replicas) == 1:
            return []
        if ranks := self.group.ranks(self.shard, replicas):
            return [
                self.ask(replica, ForwardWorker.sum_up, name, ranks, ranks[taker])
                for name, taker in statistics.items()
                for replica in replicas
            ]
        # Every replica hands out all its sums before any merges: a worker's calls run in order, and sums behind a merge
        # would keep the others waiting.
        parts = {
            name: [
                None if replica == taker else self.ask(replica, ForwardWorker.hand_out, name) for replica in replicas
            ]
            for name, taker in statistics.items()
        }
        return [self.ask(taker, ForwardWorker.merge, name, *parts[name]) for name, taker in statistics.items()]

    def share(self, names: tuple[str, ...], source: int) -> list[Ref[None]]:
        """Install the solved projections of one replica on all others; return references to wait for."""
        others = self.others(source)
        if not others:
            return []
        replicas = range(self.layout.replicas)
        if ranks := self.group.ranks(self.shard, replicas):
            return [self.ask(replica, ImprovingWorker.broadcast, names, ranks, ranks[source]) for replica in replicas]
        weights = self.ask(source, ImprovingWorker.solved, names)
        return [self.ask(replica, ImprovingWorker.install, weights) for replica in others]

    def over_waves(self, verb: Callable[..., T], *args: Any) -> dict[int, T]:
        """Call a verb for every kept wave and wait; return the results by the waves' indices."""
        results = to_waves(self.group, self.layout, self.waves, self.shard, verb, self.stream, self.layer, *args)
        found = {}
        for wave, result in zip(self.waves.in_turn(), results, strict=True):
            self.step.advance()
            found[wave.index] = result
        return found

    def wait(self, refs: Sequence[Ref[T]]) -> list[T]:
        """Return the values of references."""
        return [self.group.get(ref) for ref in refs]


def turn_of(layer: int, replicas: int) -> int:
    """Return the replica whose turn a layer is, for work that only one of them has to do."""
    return layer % replicas
