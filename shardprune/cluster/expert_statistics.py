"""The pass of `experts` over the dense model, and what it knows of the experts then.

Every wave has a tally of its own, and these are added up in the order of the waves: the statistics do not depend on who
is done first.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from shardprune.cluster.group import Group, flow
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, account, in_flight, layer_by_layer, pipeline, release, to_all
from shardprune.errors import SolverError
from shardprune.report.progress import Step
from shardprune.shard.expert_tally import statistics_of
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.solvers.expert_merging import distances
from shardprune.solvers.expert_scores import ExpertStatistics


@dataclass(frozen=True)
class Observed:
    """The statistics of a layer's experts, and the distances between their mean outputs where these are `merged`."""

    routed: ExpertStatistics
    apart: tuple[float, ...] | None = None


def routed_statistics(
    group: Group, layout: Layout, waves: Waves, layers: Iterable[int], streamed: bool, merged: bool, step: Step
) -> dict[int, Observed]:
    """Send the calibration waves through the dense model; return what is seen of the experts of some layers.

    Args:
        merged: experts are merged, so that workers sum up their outputs for all tokens, too.

    Raises:
        SolverError: outputs of experts are not finite.
    """
    wanted, stream = sorted(layers), "experts"
    found: dict[int, Observed] = {}

    def collect(index: int) -> None:
        found[index] = observed(group, layout, waves, index, merged)

    stop = wanted[-1] + 1
    last = layout.shard_of(min(stop, layout.stop - 1))
    if streamed:
        for index in layer_by_layer(group, layout, waves, stream, "dense", (), stop, step, True):
            if index in wanted:
                collect(index)
        to_all(group, layout, last, ForwardWorker.drop, stream)
    else:
        discarded = (
            group.submit(last, wave.replica, ForwardWorker.discard, hidden)
            for wave, hidden in zip(
                waves.in_turn(), pipeline(group, layout, waves, "dense", (), stop, True), strict=True
            )
        )
        for _ in flow(group, discarded, in_flight(layout)):
            step.advance()
        for index in wanted:
            collect(index)
    release(group, layout)
    account(group, layout, range(len(layout.shards)), step.record)
    return found


def parts_of_statistics(waves: Waves, layers: Iterable[int], streamed: bool) -> int:
    """Return the number of parts that `routed_statistics` reports to its progress step."""
    return len(waves.all) * (max(layers) + 1 if streamed else 1)


def observed(group: Group, layout: Layout, waves: Waves, index: int, merged: bool) -> Observed:
    """Return what all replicas have seen of a layer's experts, which may be `merged`.

    Raises:
        SolverError: outputs of experts are not finite.
    """
    routed = _statistics_of_layer(group, layout, waves, index)
    return Observed(routed, _distances_of_layer(group, layout, index) if merged else None)


def _statistics_of_layer(group: Group, layout: Layout, waves: Waves, index: int) -> ExpertStatistics:
    """Return the statistics of a layer's experts from the tallies of all replicas."""
    shard = layout.shard_of(index)
    by_replica = [iter(tallies) for tallies in to_all(group, layout, shard, ExpertWorker.tallies, index)]
    tallies: dict[int, Tensor] = {wave.index: next(by_replica[wave.replica]) for wave in waves.in_turn()}
    statistics = statistics_of([tallies[place] for place in sorted(tallies)])
    if not statistics.finite:
        raise SolverError(f"layer {index}: outputs of its experts are not finite: the activations overflow")
    return statistics


def _distances_of_layer(group: Group, layout: Layout, index: int) -> tuple[float, ...]:
    """Return the distances between the mean outputs of a layer's experts, from those of all replicas.

    Raises:
        SolverError: outputs of experts are not finite.
    """
    sums, tokens = None, 0
    for own, count in to_all(group, layout, layout.shard_of(index), ExpertWorker.outputs, index):
        sums, tokens = (own if sums is None else sums + own), tokens + count
    assert sums is not None
    if not bool(sums.isfinite().all()):
        raise SolverError(f"layer {index}: outputs of its experts are not finite: the activations overflow")
    return distances(sums, tokens)


def weight_ratios(group: Group, layout: Layout, layers: Iterable[int], step: Step) -> dict[int, tuple[float, ...]]:
    """Return mean |w| / rms(w) of every expert's weights, by layer; the replicas of a shard share its layers."""
    wanted = sorted(layers)
    refs = (
        group.submit(layout.shard_of(index), place % layout.replicas, ExpertWorker.ratios, index)
        for place, index in enumerate(wanted)
    )
    found = {}
    for index, ratios in zip(wanted, flow(group, refs, in_flight(layout)), strict=True):
        found[index] = tuple(ratios)
        step.advance()
    account(group, layout, range(len(layout.shards)), step.record)
    return found
