"""Pruning segment after segment, layer after layer, with the replicas of a shard sharing the work."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from shardprune.cluster.group import Group
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.mask_rebuilding import rebuild_layer
from shardprune.cluster.passes import Waves, account, enter, hand_on, to_all
from shardprune.cluster.pending_work import PendingWork
from shardprune.cluster.width_pruning import narrow_layer
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker, segment_stream
from shardprune.shard.prune_worker import PruneWorker
from shardprune.storage.records import LayerRecord


def prune_segments(group: Group, layout: Layout, waves: Waves, work: PendingWork, step: Step) -> None:
    """Prune every unfinished segment; lanes that share no worker go at the same time.

    The first segment starts from the embedding, the others from what `observe` kept.

    Raises:
        WorkerLost: a worker died. All workers are closed then, so that no lane goes on alone.
    """
    lanes = layout.lanes()
    if not group.concurrent:
        for lane in lanes:
            _prune_layers(group, layout, waves, work, lane, step)
        return
    with ThreadPoolExecutor(max_workers=len(lanes)) as pool:
        try:
            for future in as_completed(
                [pool.submit(_prune_layers, group, layout, waves, work, lane, step) for lane in lanes]
            ):
                future.result()
        except BaseException:
            group.close()
            raise


def _prune_layers(
    group: Group, layout: Layout, waves: Waves, work: PendingWork, lane: Sequence[range], step: Step
) -> None:
    """Prune the unfinished layers of the segments of a lane, one after the other."""
    for layers in filter(None, (work.pending(segment) for segment in lane)):
        stream = segment_stream(layers.start)
        if layers.start == 0:
            enter(group, layout, waves, stream)
        for index in layers:
            layer = LayerInWork(group, layout, waves, stream, index, step)
            if index not in work.finished:
                step.describe(f"layer {index + 1}/{len(work.shapes)}")
                _prune_layer(work, layer)
            if index + 1 in layers:
                if index in work.finished or not work.passes_on_dense:
                    version = "dense" if work.passes_on_dense else "latest"
                    layer.over_waves(ForwardWorker.propagate, version, False)
                if layout.shard_of(index + 1) != layer.shard:
                    hand_on(group, layout, waves, stream, layer.shard)
        last = layout.shard_of(layers[-1])
        to_all(group, layout, last, ForwardWorker.drop, stream)
        to_all(group, layout, last, ForwardWorker.release)


def _prune_layer(work: PendingWork, layer: LayerInWork) -> None:
    """Do what is to be done to a layer and write it: afterwards it is finished on every replica and in the output."""
    started = time.monotonic()
    if work.widths:
        kept = narrow_layer(layer, work.family.input_names, work.widths, work.passes_on_dense)
        sizes = layer.group.get(layer.ask(0, PruneWorker.sizes))
        record = LayerRecord(layer.layer, kept=kept, sizes=sizes)
    else:
        solvers = layer.share_out([_cost(work, layer.layer, names) for names in work.family.inputs])
        record = solve_layer(work, layer, solvers)
        if work.rebuilding:
            record = rebuild_layer(work, layer, record, solvers)
    written = layer.group.get(layer.ask(0, PruneWorker.write, record))
    to_all(layer.group, layer.layout, layer.shard, PruneWorker.finish, layer.layer)
    account(layer.group, layer.layout, [layer.shard], layer.step.record)
    _announce(layer, len(work.shapes), record, time.monotonic() - started, written)


def solve_layer(work: PendingWork, layer: LayerInWork, solvers: Sequence[int]) -> LayerRecord:
    """Accumulate the statistics of a layer, solve each of its inputs, and give every replica the result.

    Args:
        solvers: the replica that solves each input.
    """
    layer.over_waves(PruneWorker.accumulate, False)
    inputs = work.family.inputs
    waiting = layer.reduce(dict(zip(work.family.input_names, solvers, strict=True)))
    solving = [
        layer.ask(solver, PruneWorker.solve, group, work.shares_of(layer.layer, inputs[group]))
        for group, solver in enumerate(solvers)
    ]
    for names, solver in zip(inputs, solvers, strict=True):
        waiting += layer.share(names, solver)
    reports = {report.name: report for solved in layer.wait(solving) for report in solved}
    layer.wait(waiting)
    return LayerRecord(
        layer.layer,
        projections=tuple(reports[name] for name in work.family.projections),
        outliers=work.layer_outliers[layer.layer] if work.layer_outliers else None,
    )


def _cost(work: PendingWork, layer: int, names: Sequence[str]) -> float:
    """The operations of solving one input of a layer, roughly: factorise its Hessian, then sweep over the weights."""
    rows, cols = sum(work.shapes[layer][name][0] for name in names), work.shapes[layer][names[0]][1]
    return cols**3 + rows * cols**2


def _announce(layer: LayerInWork, layers: int, record: LayerRecord, seconds: float, written: int) -> None:
    """Say and record that a layer is finished."""
    facts: dict[str, float] = {"seconds": round(seconds, 3), "bytes": written}
    if record.sparsity is not None:
        facts["sparsity"] = round(record.sparsity, 6)
    if record.error is not None:
        facts["error"] = round(record.error, 8)
    layer.step.record("layer", layer=layer.layer, shard=layer.shard, **facts, **layer.step.position())
    found = "".join(f", {name} {facts[name]:.4f}" for name in ("sparsity", "error") if name in facts)
    layer.step.say(f"layer {layer.layer + 1}/{layers} is finished{found}, {seconds:.1f} s")
