"""Removing experts layer after layer, where each layer sees the activations behind those that have been cut."""

from collections.abc import Callable, Collection

from shardprune.cluster.expert_statistics import statistics_of_layer
from shardprune.cluster.expert_writing import write_layers
from shardprune.cluster.group import Group
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, enter, hand_on, release, to_all
from shardprune.report.progress import Step
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.solvers.expert_scores import ExpertStatistics
from shardprune.storage.records import LayerRecord

STREAM = "behind cut layers"


def remove_in_turn(
    group: Group,
    layout: Layout,
    waves: Waves,
    finished: Collection[int],
    unknown: Collection[int],
    learn: Callable[[int, ExpertStatistics], None],
    record: Callable[[int], LayerRecord],
    step: Step,
) -> None:
    """Cut and write every unfinished layer, and carry the waves on through what is left of it.

    Args:
        unknown: layers whose experts' statistics are not known.
        learn: takes those of a layer, before it is cut.
        record: returns the record of a layer to be written.

    Raises:
        SolverError: outputs of experts are not finite.
    """
    enter(group, layout, waves, STREAM)
    for shard, layers in enumerate(layout.shards):
        for index in layers:
            layer = LayerInWork(group, layout, waves, STREAM, index, step)
            if index in unknown:
                layer.over_waves(ExpertWorker.tally)
                learn(index, statistics_of_layer(group, layout, waves, index))
            if index not in finished:
                write_layers(group, layout, {index: record(index)}, step)
            if index + 1 < layout.stop:
                layer.over_waves(ForwardWorker.propagate, "latest", False)
        if shard + 1 < len(layout.shards):
            hand_on(group, layout, waves, STREAM, shard)
    to_all(group, layout, len(layout.shards) - 1, ForwardWorker.drop, STREAM)
    release(group, layout)


def parts_of_removal(waves: Waves, layout: Layout, finished: Collection[int], unknown: Collection[int]) -> int:
    """Return the number of parts that `remove_in_turn` reports to its progress step."""
    return len(waves.all) * (layout.stop - 1 + len(unknown)) + layout.stop - len(finished)
