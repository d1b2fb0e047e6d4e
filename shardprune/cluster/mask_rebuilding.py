"""Rebuilding the masks of a solved layer: first its attention, then its MLP, which sees the attention rebuilt."""

from collections.abc import Sequence
from dataclasses import replace

from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.passes import in_wave_order
from shardprune.cluster.pending_work import PendingWork
from shardprune.shard.prune_worker import PruneWorker
from shardprune.storage.records import BlockReport, LayerRecord


def rebuild_layer(work: PendingWork, layer: LayerInWork, record: LayerRecord, solvers: Sequence[int]) -> LayerRecord:
    """Rebuild the masks of both blocks on every replica; return the layer's record with what is new.

    Args:
        record: of the solved layer.
        solvers: the replica that solved each input and holds its statistics.
    """
    settings, kind = work.rebuilding, work.family.kinds[layer.layer]
    assert settings is not None
    reports = {report.name: report for report in record.projections}
    blocks = []
    for block, names in kind.blocks.items():
        before = after = None
        if settings.needs_gradients or work.measure_error:
            before = _compare(layer, block, settings.needs_gradients)
        merged = layer.reduce({block: layer.turn}) if settings.needs_gradients else []
        rebuilt = layer.ask(layer.turn, PruneWorker.rebuild, block, work.shares_of(layer.layer, names))
        layer.wait(merged)
        swaps, zeros = layer.group.get(rebuilt)
        layer.step.advance()
        layer.wait(layer.share(names, layer.turn))
        errors: dict[str, float] = {}
        if work.measure_error:
            after = _compare(layer, block, False)
            errors = _measure(work, layer, block, solvers)
        for name in names:
            error = errors.get(name, reports[name].error)
            reports[name] = replace(reports[name], zeros=zeros[name], error=error)
        blocks.append(BlockReport(layer.layer, block, swaps, before, after))
    return replace(record, projections=tuple(reports.values()), blocks=tuple(blocks))


def _compare(layer: LayerInWork, block: str, gradients: bool) -> float:
    """The relative output error of a block over all waves, ||dense - sparse||^2 / ||dense||^2."""
    pairs = in_wave_order(layer.over_waves(PruneWorker.compare, block, gradients))
    lost, norm = (sum(pair[place] for pair in pairs) for place in (0, 1))
    return lost / norm if norm > 0 else 0.0


def _measure(work: PendingWork, layer: LayerInWork, block: str, solvers: Sequence[int]) -> dict[str, float]:
    """The output errors of a block's projections, each from the replica that solved it."""
    kind = work.family.kinds[layer.layer]
    measuring = [
        layer.ask(solver, PruneWorker.measure, group, block)
        for group, solver in enumerate(solvers)
        if set(kind.inputs[group]) & set(kind.blocks[block])
    ]
    return {name: error for errors in layer.wait(measuring) for name, error in errors.items()}
