"""How queries of any length become waves."""

import random

import pytest

from shardprune.cluster.likelihoods import Queries, Query


def queries(count: int, longest: int) -> list[Query]:
    draw = random.Random(0)
    return [Query(tuple(draw.choices(range(1, 9), k=draw.randint(1, longest))), ((3,),)) for _ in range(count)]


@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("replicas", [1, 3])
def test_every_query_is_in_one_wave_padded_on_its_right(size, replicas):
    given = queries(40, 50)
    waves = Queries(given, replicas, size, wave_tokens=128, longest=50)
    seen = []
    for wave in waves.all:
        tokens = waves.windows(wave)
        assert len(tokens) <= size if size else tokens.numel() <= 128 or len(tokens) == 1
        assert tokens.shape[1] == 50 or tokens.shape[1] % 8 == 0
        for row, target, place in zip(tokens, waves.targets(wave), waves.order[wave.start : wave.stop], strict=True):
            assert tuple(row[: target.length].tolist()) == given[place].tokens
            assert not row[target.length :].any()
            assert target.continuations == given[place].continuations
            seen.append(place)
    assert sorted(seen) == list(range(40))
    lengths = [len(given[place].tokens) for place in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert {wave.replica for wave in waves.all} == set(range(replicas))


def test_waves_do_not_depend_on_the_replicas():
    given = queries(30, 20)
    one, three = (Queries(given, replicas, None, 64, 20) for replicas in (1, 3))
    assert [(wave.start, wave.stop) for wave in one.all] == [(wave.start, wave.stop) for wave in three.all]
    assert one.order == three.order
