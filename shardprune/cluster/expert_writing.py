"""Writing layers that keep some of their experts: each is a copy of stored tensors, of which workers do one at a
time."""

import time
from collections.abc import Iterable, Iterator, Mapping

from shardprune.cluster.group import Group, Ref
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import account, to_all
from shardprune.report.progress import Step
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.storage.records import LayerRecord


def write_layers(group: Group, layout: Layout, records: Mapping[int, LayerRecord], step: Step) -> None:
    """Write layers by their records; each is finished when its file is there."""
    under_way: dict[tuple[int, int], tuple[int, float, Ref[int]]] = {}

    def settle(worker: tuple[int, int]) -> None:
        if worker not in under_way:
            return
        index, started, ref = under_way.pop(worker)
        written = group.get(ref)
        shard = worker[0]
        to_all(group, layout, shard, ExpertWorker.finish, index)
        account(group, layout, [shard], step.record)
        step.advance()
        facts = {"seconds": round(time.monotonic() - started, 3), "bytes": written}
        step.record("layer", layer=index, shard=shard, **facts, **step.position())

    for place, shard, index in sorted(_places(layout, records)):  # shards write at the same time
        worker = shard, place % layout.replicas
        settle(worker)
        step.describe(f"layer {index + 1}/{layout.stop}")
        started = time.monotonic()
        under_way[worker] = index, started, group.submit(*worker, ExpertWorker.write, index, records[index])
    for worker in list(under_way):
        settle(worker)


def _places(layout: Layout, layers: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Yield each layer's place among those of its shard, its shard and its index."""
    wanted = set(layers)
    for shard, own in enumerate(layout.shards):
        for place, index in enumerate(index for index in own if index in wanted):
            yield place, shard, index
