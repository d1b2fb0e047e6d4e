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
    for together in _rounds(layout, records):
        step.describe(f"layer {max(together.values()) + 1}/{layout.stop}")
        started = time.monotonic()
        under_way: dict[tuple[int, int], Ref[int]] = {
            worker: group.submit(*worker, ExpertWorker.write, index, records[index])
            for worker, index in together.items()
        }
        # No call to all replicas while one of them writes: the others would wait for its file.
        written = {index: (group.get(under_way[worker]), time.monotonic()) for worker, index in together.items()}
        for (shard, _), index in together.items():
            to_all(group, layout, shard, ExpertWorker.finish, index)
            account(group, layout, [shard], step.record)
            step.advance()
            count, ended = written[index]
            facts = {"seconds": round(ended - started, 3), "bytes": count}
            step.record("layer", layer=index, shard=shard, **facts, **step.position())


def _rounds(layout: Layout, layers: Iterable[int]) -> Iterator[dict[tuple[int, int], int]]:
    """Yield the layers that are written at the same time by worker, one for each, until all are."""
    wanted = set(layers)
    own = [[index for index in shard if index in wanted] for shard in layout.shards]
    for start in range(0, max(map(len, own)), layout.replicas):
        yield {
            (shard, replica): index
            for shard, left in enumerate(own)
            for replica, index in enumerate(left[start : start + layout.replicas])
        }
