"""Pruning segment after segment, layer after layer, with the replicas of a shard sharing the work."""

from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from shardprune.cluster.group import Group, Ref
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, enter, hand_on, to_all, to_waves
from shardprune.progress import Step
from shardprune.shard.worker import segment_stream

Sparsities = dict[tuple[int, str], float]  # of each projection by layer and name


@dataclass(frozen=True)
class Work:
    """What is to be done: the sparsity of every projection, which layers are finished already, and the
    projections that read each input with their [rows, cols]."""

    sparsities: Sparsities
    finished: frozenset[int]
    inputs: tuple[tuple[str, ...], ...]
    shapes: list[dict[str, tuple[int, int]]]

    def pending(self, segment: range) -> range:
        """The layers of a segment up to its last unfinished one: nothing waits for the image of a later one."""
        unfinished = [layer for layer in segment if layer not in self.finished]
        return range(segment.start, unfinished[-1] + 1) if unfinished else range(0)

    def parts(self, segments: tuple[range, ...], waves: int) -> int:
        """The number of parts that pruning reports to its progress step: two passes over every unfinished
        layer and one over every finished one, but none beyond the pruning of the last."""
        passes = 0
        for segment in segments:
            pending = self.pending(segment)
            passes += sum(2 - (layer in self.finished) for layer in pending) - bool(pending)
        return waves * passes


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
            for _ in to_waves(group, layout, waves, shard, "propagate", stream, layer, "latest"):
                step.advance()
            if layout.shard_of(layer + 1) != shard:
                hand_on(group, layout, waves, stream, shard)
    last = layout.shard_of(layers[-1])
    to_all(group, layout, last, "drop", stream)
    to_all(group, layout, last, "release")


def _prune_layer(
    group: Group, layout: Layout, waves: Waves, work: Work, stream: str, shard: int, layer: int, step: Step
) -> None:
    """Accumulate, solve, write: afterwards the layer is finished on every replica and in the output."""
    for _ in to_waves(group, layout, waves, shard, "accumulate", stream, layer):
        step.advance()
    # Every replica hands out its sums before any starts to solve: a worker's calls run in order, and
    # sums behind a solve would keep the others waiting.
    solvers = _solvers(work, layer, layout.replicas)
    parts = [_sums(group, layout, shard, layer, inputs, solver) for inputs, solver in enumerate(solvers)]
    solving = []
    for inputs, solver in enumerate(solvers):
        sparsities = {name: work.sparsities[layer, name] for name in work.inputs[inputs]}
        solving.append(group.submit(shard, solver, "solve", layer, inputs, sparsities, *parts[inputs]))
    installed = []
    for inputs, solver in enumerate(solvers):
        others = [replica for replica in range(layout.replicas) if replica != solver]
        if others:
            weights = group.submit(shard, solver, "solved", layer, inputs)
            installed += [group.submit(shard, r, "install", layer, solving[inputs], weights) for r in others]
    for ref in solving + installed:
        group.get(ref)
    group.get(group.submit(shard, 0, "write", layer))
    to_all(group, layout, shard, "finish", layer)


def _sums(group: Group, layout: Layout, shard: int, layer: int, inputs: int, solver: int) -> list[Ref | None]:
    """References to the sums of every replica but the solver, in the replicas' order; none for one replica."""
    if layout.replicas == 1:
        return []
    return [
        None if replica == solver else group.submit(shard, replica, "statistics", layer, inputs)
        for replica in range(layout.replicas)
    ]


def _solvers(work: Work, layer: int, replicas: int) -> list[int]:
    """The replica that solves each input of a layer: the most costly first, to whoever has least to do."""
    costs = []
    for names in work.inputs:
        cols = work.shapes[layer][names[0]][1]
        rows = sum(work.shapes[layer][name][0] for name in names)
        costs.append(cols**3 + rows * cols**2)
    load = [0] * replicas
    solver = [0] * len(costs)
    for inputs in sorted(range(len(costs)), key=lambda index: -costs[index]):
        solver[inputs] = load.index(min(load))
        load[solver[inputs]] += costs[inputs]
    return solver
