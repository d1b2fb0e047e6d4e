"""Who does what for a layer, and in which order replicas are asked for their sums."""

import pytest
import torch

from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import plan_layout
from shardprune.cluster.passes import Waves
from shardprune.report.progress import Reporter, Step


class Recording:
    """A group that only notes what it is asked."""

    concurrent = True

    def __init__(self, joined):
        self.calls, self.joined = [], joined

    def submit(self, shard, replica, verb, *args):
        self.calls.append((shard, replica, verb.__name__, args))
        return f"{verb.__name__} of {replica}"

    def get(self, ref):
        return ref

    def ranks(self, shard, replicas):
        return tuple(10 * shard + replica for replica in replicas) if self.joined else None

    def close(self): ...


def in_work(replicas: int, layer: int = 5, joined: bool = False) -> LayerInWork:
    layout = plan_layout(8, 12, "exact", 2, replicas, None)
    waves = Waves(torch.zeros(12, 4), replicas, 2)
    return LayerInWork(Recording(joined), layout, waves, "stream", layer, Step("step", 1, Reporter(quiet=True)))


def test_all_sums_are_handed_out_before_any_are_merged():
    layer = in_work(3)
    refs = layer.reduce({"q": 0, "o": 2})
    assert refs == ["merge of 0", "merge of 2"]
    assert layer.group.calls == [
        *((1, replica, "hand_out", (5, "q")) for replica in (1, 2)),
        *((1, replica, "hand_out", (5, "o")) for replica in (0, 1)),
        (1, 0, "merge", (5, "q", None, "hand_out of 1", "hand_out of 2")),
        (1, 2, "merge", (5, "o", "hand_out of 0", "hand_out of 1", None)),
    ]


@pytest.mark.parametrize("joined", [False, True])
def test_one_replica_has_the_sums_of_all(joined):
    layer = in_work(1, joined=joined)
    assert layer.reduce({"q": 0}) == []
    assert layer.share(("q",), 0) == []
    assert layer.group.calls == []


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_layers_take_turns(layer):
    assert in_work(3, layer).turn == layer % 3
    assert in_work(3, layer).share_out([1.0]) == [layer % 3]


def test_the_most_costly_work_comes_first_to_the_replica_with_least_to_do():
    layer = in_work(3, layer=4)  # replica 1 begins
    assert layer.share_out([2, 9, 5, 4, 3]) == [2, 1, 2, 0, 0]
    assert sorted(in_work(2).share_out([1, 1, 1, 1])) == [0, 0, 1, 1]


def test_solved_projections_go_to_all_others():
    layer = in_work(3)
    layer.share(("q", "k"), 1)
    assert layer.group.calls == [
        (1, 1, "solved", (5, ("q", "k"))),
        (1, 0, "install", (5, "solved of 1")),
        (1, 2, "install", (5, "solved of 1")),
    ]


def test_replicas_of_a_process_group_go_through_one_chain_after_the_other():
    layer = in_work(3, joined=True)
    assert len(layer.reduce({"q": 0, "o": 2})) == 6
    layer.share(("q", "k"), 1)
    ranks = (10, 11, 12)
    assert layer.group.calls == [
        *((1, replica, "sum_up", (5, "q", ranks, 10)) for replica in range(3)),
        *((1, replica, "sum_up", (5, "o", ranks, 12)) for replica in range(3)),
        *((1, replica, "broadcast", (5, ("q", "k"), ranks, 11)) for replica in range(3)),
    ]
