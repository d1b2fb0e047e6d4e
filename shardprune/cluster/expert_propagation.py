"""Removing experts layer after layer: each layer sees the activations behind those that have been cut, and its router
and its kept experts may be trained."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

from shardprune.cluster.expert_statistics import Observed, observed
from shardprune.cluster.expert_writing import write_layers
from shardprune.cluster.group import Group
from shardprune.cluster.held_out import HeldOut
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, enter, hand_on, release, to_all
from shardprune.cluster.reconstruction import train
from shardprune.report.progress import Step
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.forward_worker import ForwardWorker, dense_stream
from shardprune.storage.records import LayerRecord

STREAM = "behind cut layers"


@dataclass(frozen=True)
class Training:
    """The training of what a layer keeps: `steps` of its routers, and of all its projections, by the step's name, each
    with the names of the linear maps that it changes in a layer."""

    steps: Mapping[str, int]
    names: Callable[[str, int], tuple[str, ...]]


def remove_in_turn(
    group: Group,
    layout: Layout,
    waves: Waves,
    finished: Collection[int],
    unknown: Collection[int],
    merged: bool,
    learn: Callable[[int, Observed], None],
    record: Callable[[int], LayerRecord],
    training: Training | None,
    step: Step,
) -> None:
    """Cut and write every unfinished layer, and carry the waves on through what is left of it.

    Where a layer is trained, the dense model's activations come along, and its outputs are the aim.

    Args:
        unknown: layers whose experts' statistics are not known.
        merged: experts are merged.
        learn: takes those of a layer, before it is cut.
        record: returns the record of a layer to be written.

    Raises:
        SolverError: outputs of experts are not finite.
    """
    enter(group, layout, waves, STREAM)
    streams = (STREAM, dense_stream(STREAM)) if training else (STREAM,)
    for stream in streams[1:]:
        to_all(group, layout, 0, ForwardWorker.fork, STREAM, stream)
    for shard, layers in enumerate(layout.shards):
        for index in layers:
            layer = LayerInWork(group, layout, waves, STREAM, index, step)
            if index in unknown:
                layer.over_waves(ExpertWorker.tally)
                learn(index, observed(group, layout, waves, index, merged))
            trained = False
            if index not in finished:
                own = record(index)
                if training and own.experts:
                    own, trained = _train(layer, own, training), True
                write_layers(group, layout, {index: own}, step)
            if index + 1 < layout.stop:
                layer.over_waves(ForwardWorker.propagate, "latest", False)
                if training and not trained:
                    layer.dense.over_waves(ForwardWorker.propagate, "dense", False)
        if shard + 1 < len(layout.shards):
            for stream in streams:
                hand_on(group, layout, waves, stream, shard)
    for stream in streams:
        to_all(group, layout, len(layout.shards) - 1, ForwardWorker.drop, stream)
    release(group, layout)


def _train(layer: LayerInWork, record: LayerRecord, training: Training) -> LayerRecord:
    """Cut a layer on every replica and train it towards the dense layer's output, each step kept where held-out windows
    say that it helps; return its record with what came of it."""
    assert record.experts is not None
    layer.calibrating.over_waves(ExpertWorker.aim)  # before the layer changes
    held_out = HeldOut(layer)
    layer.ask_all(ExpertWorker.cut, record.experts)
    held_out.measure()
    for name, steps in training.steps.items():
        maps = training.names(name, layer.layer)
        held_out.improve(name, maps, partial(train, layer, maps, steps, held_out.norm))
    return replace(record, improvements=tuple(held_out.reports))


def parts_of_removal(
    waves: Waves,
    layout: Layout,
    finished: Collection[int],
    unknown: Collection[int],
    trained: Collection[int],
    steps: int,
) -> int:
    """Return the number of parts that `remove_in_turn` reports to its progress step.

    Args:
        trained: layers that are trained, each by so many kinds of `steps`.
    """
    parts = len(waves.all) * (layout.stop - 1 + len(unknown)) + layout.stop - len(finished)
    if not steps:
        return parts
    aims = len(waves.all) * len(trained) + (1 + steps) * len(waves.held_out.all) * len(trained)
    return (
        parts
        + aims
        + len(waves.all) * sum(index + 1 < layout.stop for index in range(layout.stop) if index not in trained)
    )
