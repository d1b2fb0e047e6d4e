"""What the replicas of a shard give to whichever of them computes."""

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
