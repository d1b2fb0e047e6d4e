"""Pruning segment after segment, layer after layer, with the replicas of a shard sharing the work."""

from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from shardprune.cluster.group import Group, Ref
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, enter, hand_on, to_all, to_waves
from shardprune.cluster.rebuilding import rebuild_layer
from shardprune.cluster.replicas import from_others, to_others
from shardprune.cluster.work import Work
from shardprune.progress import Step
from shardprune.shard.passing import segment_stream


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
    for layer in layers:
        shard = layout.shard_of(layer)
        if layer not in work.finished:
            step.describe(f"layer {layer + 1}/{len(work.shapes)}")
            _prune_layer(group, layout, waves, work, stream, shard, layer, step)
        if layer + 1 in layers:
            for _ in to_waves(group, layout, waves, shard, "propagate", stream, layer, "latest", False):
                step.advance()
            if layout.shard_of(layer + 1) != shard:
                hand_on(group, layout, waves, stream, shard)
    last = layout.shard_of(layers[-1])
    to_all(group, layout, last, "drop", stream)
    to_all(group, layout, last, "release")


def _prune_layer(
    group: Group, layout: Layout, waves: Waves, work: Work, stream: str, shard: int, layer: int, step: Step
) -> None:
    """Accumulate, solve, rebuild, write: afterwards the layer is finished on every replica and in the output."""
    for _ in to_waves(group, layout, waves, shard, "accumulate", stream, layer):
        step.advance()
    solvers = _solvers(work, layer, layout.replicas)
    reports = _solve(group, layout, work, shard, layer, solvers)
    record: dict[str, Any] = {"outliers": work.layer_outliers[layer]} if work.layer_outliers else {}
    if work.rebuilding:
        record["blocks"] = rebuild_layer(group, layout, waves, work, stream, shard, layer, solvers, reports, step)
    record["projections"] = [reports[name] for name in work.family.projections]
    group.get(group.submit(shard, 0, "write", layer, record))
    to_all(group, layout, shard, "finish", layer)


def _solve(
    group: Group, layout: Layout, work: Work, shard: int, layer: int, solvers: list[int]
) -> dict[str, dict[str, Any]]:
    """Solve all inputs of a layer, each on its solver, and give every replica the result; the reports by name."""
    # Every replica hands out its sums before any starts to solve: a worker's calls run in order, and
    # sums behind a solve would keep the others waiting.
    parts = [
        from_others(group, layout, shard, solver, "statistics", layer, inputs) for inputs, solver in enumerate(solvers)
    ]
    solving = []
    for inputs, solver in enumerate(solvers):
        shares = work.shares_of(layer, work.family.inputs[inputs])
        solving.append(group.submit(shard, solver, "solve", layer, inputs, shares, *parts[inputs]))
    installed: list[Ref] = []
    for inputs, solver in enumerate(solvers):
        installed += to_others(group, layout, shard, solver, layer, work.family.inputs[inputs])
    reports = {report["name"]: report for ref in solving for report in group.get(ref)}
    for ref in installed:
        group.get(ref)
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
