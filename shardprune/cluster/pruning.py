"""Pruning segment after segment, layer after layer, with the replicas of a shard sharing the work."""

import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from shardprune.cluster.group import Group
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.mask_rebuilding import rebuild_layer
from shardprune.cluster.passes import Waves, account, enter, hand_on, to_all
from shardprune.cluster.pruning_job import Work
from shardprune.cluster.width_pruning import narrow_layer
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker, segment_stream
from shardprune.shard.prune_worker import PruneWorker


def prune_segments(group: Group, layout: Layout, waves: Waves, work: Work, step: Step) -> None:
    """Prune every unfinished segment; lanes that share no worker go at the same time.

    The first segment starts from the embedding, the others from what `observe` kept.

    Raises:
        WorkerLost: a worker died. All workers are closed then, so that no lane goes on alone.
    """

    def run(lane: list[range]) -> None:
        for segment in lane:
            if pending := work.pending(segment):
                _prune_layers(group, layout, waves, work, pending, step)

    lanes = layout.lanes()
    if not group.concurrent:
        for lane in lanes:
            run(lane)
        return
    with ThreadPoolExecutor(max_workers=len(lanes)) as pool:
        try:
            for future in as_completed([pool.submit(run, lane) for lane in lanes]):
                future.result()
        except BaseException:
            group.close()
            raise


def _prune_layers(group: Group, layout: Layout, waves: Waves, work: Work, layers: range, step: Step) -> None:
    """Prune the unfinished ones of a segment's layers, the last of which is unfinished."""
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
                for _ in layer.over_waves(
                    ForwardWorker.propagate, "dense" if work.passes_on_dense else "latest", False
                ):
                    pass
            if layout.shard_of(index + 1) != layer.shard:
                hand_on(group, layout, waves, stream, layer.shard)
    last = layout.shard_of(layers[-1])
    to_all(group, layout, last, ForwardWorker.drop, stream)
    to_all(group, layout, last, ForwardWorker.release)


def _prune_layer(work: Work, layer: LayerInWork) -> None:
    """Do what is to be done to a layer and write it: afterwards it is finished on every replica and in the output."""
    started = time.monotonic()
    if work.widths:
        record = narrow_layer(layer, work.widths, work.passes_on_dense)
        record |= layer.group.get(layer.ask(0, PruneWorker.sizes))
    else:
        record = _sparsify_layer(work, layer)
    written = layer.group.get(layer.ask(0, PruneWorker.write, record))
    to_all(layer.group, layer.layout, layer.shard, PruneWorker.finish, layer.layer)
    account(layer.group, layer.layout, [layer.shard], layer.step.record)
    _announce(layer, len(work.shapes), record, time.monotonic() - started, written)


def _announce(layer: LayerInWork, layers: int, record: dict[str, Any], seconds: float, written: int) -> None:
    """Say and record that a layer is finished."""
    facts = {"seconds": round(seconds, 3), "bytes": written} | _quality(record)
    layer.step.record("layer", layer=layer.layer, shard=layer.shard, **facts, **layer.step.position())
    found = "".join(f", {name} {facts[name]:.4f}" for name in ("sparsity", "error") if name in facts)
    layer.step.say(f"layer {layer.layer + 1}/{layers} is finished{found}, {seconds:.1f} s")


def _quality(record: dict[str, Any]) -> dict[str, float]:
    """The sparsity of a finished layer and its projections' mean relative output error, as far as they are known."""
    reports = record.get("projections", [])
    errors = [report["error"] for report in reports if "error" in report] or list(record.get("errors", {}).values())
    weights = sum(report["weights"] for report in reports)
    sparsity = {"sparsity": round(sum(report["zeros"] for report in reports) / weights, 6)} if weights else {}
    return sparsity | ({"error": round(sum(errors) / len(errors), 8)} if errors else {})


def _sparsify_layer(work: Work, layer: LayerInWork) -> dict[str, Any]:
    """Accumulate, solve, rebuild; the record of the layer."""
    for _ in layer.over_waves(PruneWorker.accumulate):
        pass
    solvers = _solvers(work, layer.layer, layer.layout.replicas)
    reports = _solve(work, layer, solvers)
    record: dict[str, Any] = {"outliers": work.layer_outliers[layer.layer]} if work.layer_outliers else {}
    if work.rebuilding:
        rebuilt = rebuild_layer(work, layer, solvers)
        record["blocks"] = rebuilt.blocks
        reports = {name: report | rebuilt.projections[name] for name, report in reports.items()}
    record["projections"] = [
        {**reports[name], "achieved": reports[name]["zeros"] / reports[name]["weights"]}
        for name in work.family.projections
    ]
    return record


def _solve(work: Work, layer: LayerInWork, solvers: list[int]) -> dict[str, dict[str, Any]]:
    """Solve all inputs of a layer, each on its solver, and give every replica the result; the reports by name."""
    # Every replica hands out its sums before any starts to solve: a worker's calls run in order, and
    # sums behind a solve would keep the others waiting.
    parts = [layer.from_others(solver, PruneWorker.statistics, inputs) for inputs, solver in enumerate(solvers)]
    solving = []
    for inputs, solver in enumerate(solvers):
        shares = work.shares_of(layer.layer, work.family.inputs[inputs])
        solving.append(layer.ask(solver, PruneWorker.solve, inputs, shares, *parts[inputs]))
    installed = [
        ref for inputs, solver in enumerate(solvers) for ref in layer.share(work.family.inputs[inputs], solver)
    ]
    reports = {report["name"]: report for ref in solving for report in layer.group.get(ref)}
    for ref in installed:
        layer.group.get(ref)
    return reports


def _solvers(work: Work, layer: int, replicas: int) -> list[int]:
    """The replica that solves each input of a layer: the most costly first, to whoever has least to do."""
    costs = []
    for names in work.family.inputs:
        cols = work.shapes[layer][names[0]][1]
        rows = sum(work.shapes[layer][name][0] for name in names)
        costs.append(cols**3 + rows * cols**2)
    load = [0] * replicas
    solver = [0] * len(costs)
    for inputs in sorted(range(len(costs)), key=lambda index: -costs[index]):
        solver[inputs] = load.index(min(load))
        load[solver[inputs]] += costs[inputs]
    return solver
