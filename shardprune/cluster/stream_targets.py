"""Pruning a layer whose projections aim at the dense residual stream.

Input by input, each with those before it pruned already: what a projection can make up for is known only then.
"""

from collections.abc import Sequence
from functools import partial

from shardprune.cluster.held_out import HeldOut
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.pending_work import PendingWork
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.stream_targets import differences_of
from shardprune.solvers.allocation.allocation import Share
from shardprune.storage.records import LayerRecord, ProjectionReport

STEP = "stream targets"


def solve_towards_stream(
    work: PendingWork, layer: LayerInWork, held_out: HeldOut, solvers: Sequence[int]
) -> LayerRecord:
    """Solve each input of a layer as it is, and again towards the dense stream, which stays where it is better; give
    every replica the result.

    Args:
        solvers: the replica that solves each input.
    """
    layer.ask_all(PruneWorker.keep_dense)
    reports = {}
    kind = work.family.kinds[layer.layer]
    inputs = kind.inputs
    for group, (names, solver) in enumerate(zip(inputs, solvers, strict=True)):
        passed_on = group == len(inputs) - 1  # nothing needs the dense activations before the layer any more
        layer.calibrating.over_waves(PruneWorker.confront, group, passed_on)
        reader, shares = names[0], work.shares_of(layer.layer, names)
        merging = layer.reduce({reader: solver, differences_of(reader): solver})
        plain = layer.ask(solver, PruneWorker.solve, group, shares)
        layer.wait([*merging, *layer.share(names, solver)])
        held_out.measure()
        corrected = held_out.improve(STEP, names, partial(_correct, layer, solver, group, names, shares))
        reports.update({report.name: report for report in corrected or layer.group.get(plain)})
        layer.step.advance(work.solve_parts(layer.layer, names, layer.waves.tokens_of_one))
    return LayerRecord(
        layer.layer,
        projections=tuple(reports[name] for name in kind.projections),
        outliers=work.layer_outliers[layer.layer] if work.layer_outliers else None,
    )


def _correct(
    layer: LayerInWork, solver: int, group: int, names: tuple[str, ...], shares: dict[str, Share]
) -> list[ProjectionReport]:
    """Solve an input towards the dense stream, and give every replica the result."""
    corrected = layer.ask(solver, PruneWorker.correct, group, shares)
    layer.wait(layer.share(names, solver))
    return layer.group.get(corrected)
