"""The calls that a driver makes of its workers."""

from collections import Counter
from typing import Any

import pytest

from shardprune.shard.verbs import kind_of


def counted(monkeypatch: pytest.MonkeyPatch, group: type) -> Counter[tuple[str, int]]:
    """Return the calls of workers of a kind of group from now on, by verb and shard."""
    calls: Counter[tuple[str, int]] = Counter()
    submit = group.submit

    def counting(self: Any, shard: int, replica: int, verb: Any, *args: Any) -> Any:
        if kind_of(verb):
            calls[verb.__name__, shard] += 1
        return submit(self, shard, replica, verb, *args)

    monkeypatch.setattr(group, "submit", counting)
    return calls
