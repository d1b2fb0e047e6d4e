"""Error curves of all projections, measured where the layers are: an allocation shares the sparsity out by them.

Dense waves go through all shards and leave what enters each layer there; the last shard draws labels from what the
model predicts, and the gradients of the loss go back from the last layer to the first. Then all shards measure at the
same time what their projections lose. Only the curves travel to the driver.
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from shardprune.cluster.group import Group, Ref, flow
from shardprune.cluster.lanes import side_by_side
from shardprune.cluster.layer_in_work import LayerInWork
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import (
    Waves,
    account,
    hand_back,
    in_flight,
    judged,
    parts_of_pass,
    release,
    through_all_layers,
    to_all,
    to_waves,
)
from shardprune.cluster.solution_parts import cost_of_solution
from shardprune.model.families import Family, LayerKind
from shardprune.model.pruning_job import Curves, Shapes
from shardprune.report.progress import Step
from shardprune.shard.error_curves import GRADIENTS, gradients_of
from shardprune.shard.forward_worker import ForwardWorker, segment_stream
from shardprune.shard.prune_worker import PruneWorker
from shardprune.solvers.allocation.knapsack import Curve
from shardprune.solvers.error_curves import with_prior
from shardprune.solvers.methods import Effort


def parts_of_curves(waves: Waves, family: Family, streamed: bool) -> int:
    """Return the number of parts that `differentiate` and `measure` report to their progress step."""
    count, layers = len(waves.all), len(family.kinds)
    forward, backward = parts_of_pass(waves, layers, streamed), count * (layers if streamed else 1)
    return forward + backward + sum(count + len(kind.inputs) for kind in family.kinds if kind.inputs)


def differentiate(group: Group, layout: Layout, waves: Waves, streamed: bool, step: Step) -> None:
    """Send dense waves forward and the gradients of the loss back: every layer keeps what enters it and has the squared
    gradients at its projections summed up.

    Raises:
        SolverError: the logits are not finite.
    """
    last = len(layout.shards) - 1
    arrived = through_all_layers(group, layout, waves, "dense", streamed, step, tuple(range(layout.stop)))
    windows = {wave.index: (wave.index, wave.start, wave.stop) for wave in waves.all}
    for _ in judged(group, layout, arrived, PruneWorker.draw_labels, lambda wave: windows[wave.index], step):
        pass
    if not streamed:
        for _ in flow(group, _pipeline_back(group, layout, waves), in_flight(layout)):
            step.advance()
    else:
        for shard in reversed(range(last + 1)):
            for index in reversed(layout.shards[shard]):
                for _ in to_waves(group, layout, waves, shard, PruneWorker.differentiate, GRADIENTS, index):
                    step.advance()
            if shard:
                hand_back(group, layout, waves, GRADIENTS, shard)
        to_all(group, layout, 0, ForwardWorker.drop, GRADIENTS)
    account(group, layout, range(last + 1), step.record)


def _pipeline_back(group: Group, layout: Layout, waves: Waves) -> Iterator[Ref[None]]:
    """Send the gradients of every wave from the last shard back to the first, one wave behind the other."""
    last = len(layout.shards) - 1
    for wave in waves.in_turn():
        gradient: Ref[Tensor] = group.submit(last, wave.replica, ForwardWorker.take, GRADIENTS, wave.index)
        for shard in reversed(range(last + 1)):
            gradient = group.submit(shard, wave.replica, PruneWorker.backward, wave.index, gradient)
        yield group.submit(0, wave.replica, ForwardWorker.discard, gradient)


def measure(
    group: Group,
    layout: Layout,
    waves: Waves,
    family: Family,
    shapes: Shapes,
    levels: list[float],
    damping: float,
    step: Step,
) -> Curves:
    """Return the error curves of all projections, after `differentiate`; shards measure theirs at the same time.

    Args:
        shapes: [rows, cols] of every projection, by layer.
        levels: sparsities, ascending.
        damping: of Gram matrices, fraction of their mean diagonal.

    Raises:
        SolverError: names the projection.
        WorkerLost: a worker died.
    """

    def of_layer(index: int) -> Curves:
        layer, kind = LayerInWork(group, layout, waves, segment_stream(index), index, step), family.kinds[index]
        if kind.inputs:
            layer.ask_all(PruneWorker.begin_curves)
            layer.over_waves(PruneWorker.gather)
        if kind.mixtures:
            layer.ask_all(PruneWorker.gathered, len(waves.tokens))
        costs = [cost_of_solution(Effort(sweeps=True), shapes[index], names) for names in kind.inputs]
        solvers = layer.share_out(costs)
        takers = dict(zip(kind.input_names, solvers, strict=True))
        layer.wait(layer.reduce(takers | {gradients_of(name): taker for name, taker in takers.items()}))
        tokens = waves.tokens.numel()
        found: dict[tuple[int, str], Curve] = {}
        refs = [
            layer.ask(solver, PruneWorker.measure_curves, place, levels, damping, tokens)
            for place, solver in enumerate(solvers)
        ]
        for ref in refs:
            found.update({(index, name): curve for name, curve in group.get(ref).items()})
            step.advance()
        to_all(group, layout, layer.shard, ForwardWorker.drop, layer.stream)
        for names in _experts_alike(kind):
            seen = tokens * kind.share_of_tokens(names[0])
            curves = with_prior({name: found[index, name] for name in names}, seen)
            found.update({(index, name): curve for name, curve in curves.items()})
        return found

    def of_shard(shard: int) -> Curves:
        found = {place: curve for index in layout.shards[shard] for place, curve in of_layer(index).items()}
        account(group, layout, [shard], step.record)
        return found

    lanes = side_by_side(group, [partial(of_shard, shard) for shard in range(len(layout.shards))])
    release(group, layout)
    return {place: curve for own in lanes for place, curve in own.items()}


def _experts_alike(kind: LayerKind) -> list[tuple[str, ...]]:
    """Return the projections that are the same part of the experts of one mixture, for every part of every mixture."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in kind.projections:
        if path := kind.mixture_of(name):
            found.setdefault((path, name.rpartition(".")[2]), []).append(name)
    return [tuple(names) for names in found.values()]
