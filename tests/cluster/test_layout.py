import pytest

from shardprune.cluster.layout import Layout, plan_layout
from shardprune.errors import InputError
from shardprune.shard.waves import split, waves_of


def spans(ranges) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in ranges]


def test_exact_has_one_segment_over_all_shards():
    layout = plan_layout(8, 16, "exact", shards=3, replicas=2, segments=None)
    assert spans(layout.segments) == [(0, 8)]
    assert spans(layout.shards) == [(0, 2), (2, 5), (5, 8)]
    assert layout.lanes() == [[range(8)]]
    assert [layout.shard_of(layer) for layer in (0, 2, 7)] == [0, 1, 2]


def test_parallel_has_a_segment_per_shard_unless_told_otherwise():
    assert spans(plan_layout(8, 16, "parallel", 4, 1, None).segments) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    layout = plan_layout(8, 16, "parallel", 2, 1, 3)
    assert spans(layout.segments) == [(0, 2), (2, 5), (5, 8)]
    assert spans(layout.shards) == [(0, 2), (2, 8)]
    assert [spans(lane) for lane in layout.lanes()] == [[(0, 2)], [(2, 5), (5, 8)]]


def test_losing_workers_keeps_the_segments():
    layout = plan_layout(8, 16, "parallel", 4, 2, None)
    smaller = layout.shrunk_to(3)
    assert smaller.segments == layout.segments
    assert (len(smaller.shards), smaller.replicas) == (3, 1)
    assert spans(smaller.shards) == [(0, 2), (2, 4), (4, 8)]
    assert layout.shrunk_to(1) == Layout(layout.segments, (range(8),), 1)
    assert layout.shrunk_to(9) is layout


@pytest.mark.parametrize(
    ("shards", "replicas", "slots", "left"),
    [(4, 2, 7, (4, 1)), (4, 2, 4, (4, 1)), (2, 3, 5, (2, 2)), (2, 3, 3, (2, 1)), (1, 4, 3, (1, 3)), (4, 1, 2, (2, 1))],
)
def test_losing_workers_keeps_shards_as_small_as_they_are_while_there_are_replicas(shards, replicas, slots, left):
    smaller = plan_layout(8, 16, "exact", shards, replicas, None).shrunk_to(slots)
    assert (len(smaller.shards), smaller.replicas) == left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 16, "exact", 5, 1, None), "shards: 5 is more than the model's 4 layers"),
        ((4, 2, "exact", 1, 3, None), "replicas: 3 is more than the 2 samples"),
        ((4, 8, "exact", 1, 5, None, 4), "replicas: 5 is more than the 4 of 8 samples that are not held out"),
        ((4, 16, "exact", 1, 1, 2), "segments: 2 needs propagation parallel"),
        ((4, 16, "parallel", 1, 1, 5), "segments: 5 is more than the model's 4 layers"),
        ((4, 16, "parallel", 3, 1, 2), "segments: 2 is fewer than the 3 shards"),
    ],
)
def test_layouts_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        plan_layout(*arguments)


@pytest.mark.parametrize(("samples", "replicas", "size"), [(10, 3, 2), (16, 1, 16), (7, 7, 4), (5, 2, 1)])
def test_waves_cover_every_sample_once_in_order(samples, replicas, size):
    waves = waves_of(samples, replicas, size)
    assert [row for wave in waves for row in range(wave.start, wave.stop)] == list(range(samples))
    assert all(0 < wave.stop - wave.start <= size for wave in waves)
    shares = [sum(wave.stop - wave.start for wave in waves if wave.replica == r) for r in range(replicas)]
    assert max(shares) - min(shares) <= 1


def test_split_is_even():
    assert [len(part) for part in split(10, 4)] == [2, 3, 2, 3]
