"""A layer in work, as the driver sees it: its waves and the replicas of its shard."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from shardprune.cluster.group import Group, Ref
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, to_waves
from shardprune.report.progress import Step
from shardprune.shard.prune_worker import PruneWorker

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

    def ask(self, replica: int, verb: Callable[..., T], *args: Any) -> Ref[T]:
        """Call a verb of one replica for this layer."""
        return self.group.submit(self.shard, replica, verb, self.layer, *args)

    def from_others(self, asked: int, verb: Callable[..., T], *args: Any) -> list[Ref[T] | None]:
        """References to what a verb gives on every replica but the one asked, in the replicas' order with None
        in its place; empty where there is one replica."""
        if self.layout.replicas == 1:
            return []
        return [None if replica == asked else self.ask(replica, verb, *args) for replica in range(self.layout.replicas)]

    def over_waves(self, verb: Callable[..., T], *args: Any) -> Iterator[tuple[int, T]]:
        """Call a verb for every kept wave; the waves' indices and results as they finish."""
        results = to_waves(self.group, self.layout, self.waves, self.shard, verb, self.stream, self.layer, *args)
        for wave, result in zip(self.waves.in_turn(), results, strict=True):
            self.step.advance()
            yield wave.index, result

    def share(self, names: tuple[str, ...], source: int) -> list[Ref]:
        """Install the solved projections of one replica on all others; references to wait for."""
        others = [replica for replica in range(self.layout.replicas) if replica != source]
        if not others:
            return []
        weights = self.ask(source, PruneWorker.solved, names)
        return [self.ask(replica, PruneWorker.install, weights) for replica in others]
