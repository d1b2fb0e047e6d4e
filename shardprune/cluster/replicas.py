"""What the replicas of a shard give one another: sums towards whoever computes, results back to the others."""

from typing import Any

from shardprune.cluster.group import Group, Ref
from shardprune.cluster.layout import Layout


def from_others(group: Group, layout: Layout, shard: int, asked: int, verb: str, *args: Any) -> list[Ref | None]:
    """References to what a verb gives on every replica but the one asked, in the replicas' order with None in
    its place; empty where there is one replica."""
    if layout.replicas == 1:
        return []
    return [
        None if replica == asked else group.submit(shard, replica, verb, *args) for replica in range(layout.replicas)
    ]


def to_others(group: Group, layout: Layout, shard: int, source: int, layer: int, names: tuple[str, ...]) -> list[Ref]:
    """Install the solved projections of one replica on all others; references to wait for."""
    others = [replica for replica in range(layout.replicas) if replica != source]
    if not others:
        return []
    weights = group.submit(shard, source, "solved", layer, names)
    return [group.submit(shard, replica, "install", layer, weights) for replica in others]
