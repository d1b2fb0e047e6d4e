"""Pruning segment after segment, layer after layer, with the replicas of a shard sharing the work."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from shardprune.cluster.group import Group
from shardprune.cluster.held_out import HeldOut
from shardprune.cluster.lanes import side_by_side
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.mask_rebuilding import rebuild_layer
from shardprune.cluster.passes import Waves, account, enter, hand_on, to_all
from shardprune.cluster.pending_work import PendingWork
from shardprune.cluster.reconstruction import reconstruct_layer
from shardprune.cluster.stream_targets import solve_towards_stream
from shardprune.cluster.width_pruning import narrow_layer
from shardprune.errors import WorkerLost
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker, dense_stream, segment_stream
from shardprune.shard.prune_worker import PruneWorker
from shardprune.storage.records import LayerRecord, ProjectionReport


def prune_segments(group: Group, layout: Layout, waves: Waves, work: PendingWork, step: Step) -> None:
    """Prune every unfinished segment; lanes that share no worker go at the same time.

    The first segment starts from the embedding, the others from what `observe` kept.

    Raises:
        WorkerLost: a worker died. All workers are closed then, so that no lane goes on alone.
    """
    side_by_side(group, [partial(_prune_layers, group, layout, waves, work, lane, step) for lane in layout.lanes()])


def _prune_layers(
    group: Group, layout: Layout, waves: Waves, work: PendingWork, lane: Sequence[range], step: Step
) -> None:
    """Prune the unfinished layers of the segments of a lane, one after the other. The file of one is written while the
    next one is in work."""
    files = _Files(len(work.shapes))
    try:
        for layers in filter(None, (work.pending(segment) for segment in lane)):
            stream = segment_stream(layers.start)
            if layers.start == 0:
                enter(group, layout, waves, stream)
            if work.improving:
                first = layout.shard_of(layers.start)
                to_all(group, layout, first, ForwardWorker.fork, stream, dense_stream(stream))
            for index in layers:
                layer = LayerInWork(group, layout, waves, stream, index, step)
                if index not in work.finished:
                    step.describe(f"layer {index + 1}/{len(work.shapes)}")
                    started = time.monotonic()
                    record = _narrow_layer(work, layer) if work.widths else _prune_layer(work, layer)
                    files.write(layer, record, started)
                if index + 1 in layers:
                    if work.improving and work.is_bare(index):  # in memory, and its file may not be there yet
                        layer.dense.over_waves(ForwardWorker.propagate, "latest", False)
                    elif work.improving and index in work.finished:
                        layer.dense.over_waves(ForwardWorker.propagate, "dense", False)
                    if index in work.finished or not work.passes_on_dense:
                        version = "dense" if work.passes_on_dense else "latest"
                        layer.over_waves(ForwardWorker.propagate, version, False)
                    if layout.shard_of(index + 1) != layer.shard:
                        for moved in work.streams(stream):
                            hand_on(group, layout, waves, moved, layer.shard)
            last = layout.shard_of(layers[-1])
            for over in work.streams(stream):
                to_all(group, layout, last, ForwardWorker.drop, over)
            to_all(group, layout, last, ForwardWorker.release)
    except WorkerLost:
        raise
    except Exception:  # such as a layer that cannot be solved: the one before it is kept
        files.settle()
        raise
    files.settle()


def _narrow_layer(work: PendingWork, layer: LayerInWork) -> LayerRecord:
    """Make a layer narrower on every replica, and train it where that is asked for: all but its file.

    Returns its record.
    """
    assert work.widths is not None
    held_out = HeldOut(layer) if work.improving else None
    if held_out:  # before the layer changes
        layer.calibrating.over_waves(PruneWorker.aim)
    inputs = work.family.kinds[layer.layer].input_names
    kept = narrow_layer(layer.calibrating, inputs, work.widths, work.passes_on_dense)
    layer.step.advance(work.narrow_parts(layer.layer, layer.waves.tokens_of_one))
    record = LayerRecord(layer.layer, kept=kept)
    if held_out:
        record = reconstruct_layer(work, layer, record, held_out)
        record = replace(record, improvements=tuple(held_out.reports))
    return replace(record, sizes=layer.group.get(layer.ask(0, PruneWorker.sizes)))


def _prune_layer(work: PendingWork, layer: LayerInWork) -> LayerRecord:
    """Solve a layer on every replica, rebuild its masks and improve it where that is asked for: all but its file.

    Returns its record.
    """
    if work.is_bare(layer.layer):
        return LayerRecord(layer.layer)
    solvers = layer.share_out([work.cost(layer.layer, names) for names in work.family.kinds[layer.layer].inputs])
    held_out = HeldOut(layer) if work.improving else None
    if held_out and work.improving.stream_targets:
        record = solve_towards_stream(work, layer, held_out, solvers)
    else:
        if held_out:  # before the layer changes
            layer.calibrating.over_waves(PruneWorker.aim)
        record = solve_layer(work, layer, solvers)
    if work.rebuilding:
        record = rebuild_layer(work, layer.calibrating, record, solvers)
    if held_out and work.improving.reconstruction:
        record = reconstruct_layer(work, layer, record, held_out)
    return replace(record, improvements=tuple(held_out.reports)) if held_out else record


def solve_layer(work: PendingWork, layer: LayerInWork, solvers: Sequence[int]) -> LayerRecord:
    """Accumulate the statistics of a layer, solve each of its inputs, and give every replica the result: chunk by chunk
    of its experts, all else with the last one.

    Args:
        solvers: the replica that solves each input.
    """
    kind, solved = work.family.kinds[layer.layer], _Solved(work, layer)
    reports: dict[str, ProjectionReport] = {}
    for places in work.chunks_of(layer.layer):
        layer.calibrating.over_waves(PruneWorker.accumulate, False, places)
        if work.improving.measured:
            layer.held_out.over_waves(PruneWorker.hold_out, places)
        waiting = layer.reduce({kind.input_names[place]: solvers[place] for place in places})
        solving = {}
        for place in places:
            names = kind.inputs[place]
            solving[names] = layer.ask(solvers[place], PruneWorker.solve, place, work.shares_of(layer.layer, names))
            if not layer.group.concurrent:  # it is done by now
                solved.add(names)
        for place in places:
            waiting += layer.share(kind.inputs[place], solvers[place])
        for names, ref in solving.items():
            reports.update({report.name: report for report in layer.group.get(ref)})
            if layer.group.concurrent:
                solved.add(names)
        layer.wait(waiting)
    return LayerRecord(
        layer.layer,
        projections=tuple(reports[name] for name in kind.projections),
        outliers=work.layer_outliers[layer.layer] if work.layer_outliers else None,
    )


class _Solved:
    """The count of a layer's projections that are solved, on the progress step."""

    def __init__(self, work: PendingWork, layer: LayerInWork) -> None:
        self._work, self._layer, self._count = work, layer, 0
        self._describe()

    def add(self, names: tuple[str, ...]) -> None:
        """Count the projections of one input, which are solved."""
        self._count += len(names)
        self._layer.step.advance(self._work.solve_parts(self._layer.layer, names, self._layer.waves.tokens_of_one))
        self._describe()

    def _describe(self) -> None:
        of_all = len(self._work.family.kinds[self._layer.layer].projections)
        solving = f", {self._count} of {of_all} projections solved" if self._count < of_all else ""
        self._layer.step.describe(f"layer {self._layer.layer + 1}/{len(self._work.shapes)}{solving}")


@dataclass
class _Files:
    """The files of a lane's layers, of which one is written behind the layer in work: a layer is finished when its file
    is there.

    `layers` is the number of layers of the model. `_under_way` is the layer whose file is being written, with its
    record and the seconds that it took.
    """

    layers: int
    _under_way: tuple[LayerInWork, LayerRecord, float] | None = None

    def write(self, layer: LayerInWork, record: LayerRecord, started: float) -> None:
        """Begin to write a layer, once the file before it is there; it is the pruned one on every replica then.

        Args:
            started: when work on the layer began.
        """
        seconds = time.monotonic() - started
        self.settle()
        layer.wait([layer.ask(0, PruneWorker.write, record)])
        to_all(layer.group, layer.layout, layer.shard, PruneWorker.finish, layer.layer)
        self._under_way = layer, record, seconds

    def settle(self) -> None:
        """Wait for the file that is being written, and say and record that its layer is finished."""
        if self._under_way is None:
            return
        (layer, record, seconds), self._under_way = self._under_way, None
        started = time.monotonic()
        written = layer.group.get(layer.ask(0, PruneWorker.written))
        account(layer.group, layer.layout, [layer.shard], layer.step.record)
        layer.step.advance()
        facts: dict[str, float] = {"seconds": round(seconds + time.monotonic() - started, 3), "bytes": written}
        if record.sparsity is not None:
            facts["sparsity"] = round(record.sparsity, 6)
        if record.error is not None:
            facts["error"] = round(record.error, 8)
        layer.step.record("layer", layer=layer.layer, shard=layer.shard, **facts, **layer.step.position())
        found = "".join(f", {name} {facts[name]:.4f}" for name in ("sparsity", "error") if name in facts)
        layer.step.say(f"layer {layer.layer + 1}/{self.layers} is finished{found}, {facts['seconds']:.1f} s")
