"""Some replicas of every shard as a group of their own."""

from collections.abc import Sequence
from typing import Any

from shardprune.cluster.group import Group, Ref


class Team:
    """Workers [shard][member], the members being some of the replicas; calls go to the whole group."""

    def __init__(self, group: Group, members: Sequence[int]) -> None:
        self.concurrent = group.concurrent
        self.members = tuple(members)
        self._group = group

    def submit(self, shard: int, replica: int, verb: str, *args: Any) -> Ref:
        return self._group.submit(shard, self.members[replica], verb, *args)

    def get(self, ref: Ref) -> Any:
        return self._group.get(ref)

    def close(self) -> None:
        self._group.close()
