"""What each call of a verb takes a worker that only knows how long everything takes, and which layers it reads."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import torch

from shardprune.planning.costs import Costs
from shardprune.planning.shapes import Input
from shardprune.planning.simulated_worker import Worker
from shardprune.shard.error_curves import GRADIENTS, gradients_of
from shardprune.shard.expert_tally import SUMS
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.improving_worker import ImprovingWorker
from shardprune.shard.narrowed_layers import NarrowedLayers
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.stream_targets import differences_of
from shardprune.shard.verbs import layer_of
from shardprune.solvers.outliers import Outliers
from shardprune.storage.records import ProjectionReport

# A call's seconds, its value for the driver, and the bytes of its result where it travels.
Cost = tuple[float, Any, int]


def _embed(worker: Worker, args: tuple[Any, ...]) -> Cost:
    sequences = len(args[0])
    return worker.costs.embed(sequences), None, worker.costs.wave_bytes(sequences)


def _forward(worker: Worker, args: tuple[Any, ...]) -> Cost:
    wave, _, _, record, stop, observed = args
    sequences = worker.size_of(wave)
    layers = [layer for layer in worker.layers if layer < stop]
    kept = sum(worker.costs.put(sequences) for layer in worker.layers if layer in record)
    costs = worker.costs.of_experts if observed else worker.seen(layers)
    return costs.forward(sequences, layers) + kept, None, worker.costs.wave_bytes(sequences)


def _propagate(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, wave, index, _, observed = args
    costs = worker.costs.of_experts if observed else worker.seen([index])
    return costs.propagate(worker.size_of(wave)), None, 0


def _of_wave(seconds: Callable[[Costs, int], float]) -> Callable[[Worker, tuple[Any, ...]], Cost]:
    def cost(worker: Worker, args: tuple[Any, ...]) -> Cost:
        sequences = worker.size_of(args[1])
        name = seconds.__name__  # of a method that a kind of costs may override
        return getattr(worker.costs, name)(sequences), None, 0

    return cost


def _put(worker: Worker, args: tuple[Any, ...]) -> Cost:
    stream, wave, _ = args
    return worker.costs.put(worker.size_of(wave)) * _width(worker, stream), None, 0


def _take(worker: Worker, args: tuple[Any, ...]) -> Cost:
    stream, wave = args
    sequences, width = worker.size_of(wave), _width(worker, stream)
    return worker.costs.take(sequences) * width, None, worker.costs.wave_bytes(sequences) * width


def _width(worker: Worker, stream: str) -> int:
    """The bytes of the waves of a stream, by those of activations."""
    return 4 // worker.costs.task.itemsize if stream == GRADIENTS else 1


def _draw_labels(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.draw_labels(worker.size_of(args[1][0])), None, 0


def _backward(worker: Worker, args: tuple[Any, ...]) -> Cost:
    sequences = worker.size_of(args[0])
    return worker.costs.backward(sequences, worker.layers), None, worker.costs.gradient_bytes(sequences)


def _begin_curves(worker: Worker, args: tuple[Any, ...]) -> Cost:
    worker.gathered.add(args[0])
    return 0.0, None, 0


def _measure_curves(worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, place = args[:2]
    worker.gathered.discard(index)
    names = worker.costs.task.model.skeleton.family.kinds[index].inputs[place]
    return worker.costs.measure_curves(worker.costs.task.model.inputs[place]), dict.fromkeys(names, ()), 0


def _losses(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.losses(len(args[1])), [0.0] * len(args[1]), 0


def _fork(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.fork(-(-worker.costs.task.samples // worker.costs.setup.layout.replicas)), None, 0


def _accumulate(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, wave, index, passed_on, *places = args
    worker.summed.add(index)
    if passed_on:
        return worker.costs.pass_on(worker.size_of(wave)), None, 0
    everything = tuple(range(len(worker.costs.task.model.inputs)))
    return worker.costs.accumulate(worker.size_of(wave), *(places or [everything])), None, 0


def _hold_out(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, wave, index, places = args
    worker.summed.add(index)
    return worker.costs.accumulate(worker.size_of(wave), places), None, 0


def _hand_out(worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, name = args
    if (sums := _sums_of(worker, index, name)) is None:
        return 0.0, None, 0
    costs, one, differences = sums
    return costs.statistics(one, differences), None, costs.sums_bytes(one, differences)


def _merge(worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, name, *parts = args
    if (sums := _sums_of(worker, index, name)) is None:
        return 0.0, None, 0
    costs, one, differences = sums
    return costs.merge(one, len(parts), differences), None, 0


def _sum_up(worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, name, ranks, _ = args
    if (sums := _sums_of(worker, index, name)) is None:
        return 0.0, None, 0
    costs, one, differences = sums
    return costs.sum_up(one, ranks, differences), None, costs.sums_bytes(one, differences)


def _broadcast(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, names, ranks, _ = args
    inputs = _inputs_of(worker, names)
    count = sum(worker.costs.projections_bytes(one) for one in inputs)
    return sum(worker.costs.broadcast(one, ranks) for one in inputs), None, count


def _finish(worker: Worker, args: tuple[Any, ...]) -> Cost:
    worker.summed.clear()
    if worker.costs.task.model.narrower:
        worker.cut.add(args[0])
    return 0.0, None, 0


def _narrow(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.narrow(), None, 0


def _choice(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.choice(), None, worker.costs.choice_bytes()


def _install_narrowed(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.install_narrowed(), None, 0


def _sizes(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.sizes(), None, 0


def _confront(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, wave, index, place, passed_on = args
    worker.summed.add(index)
    return worker.costs.confront(worker.size_of(wave), place, passed_on), None, 0


def _judge(seconds: Callable[[Costs, int], float]) -> Callable[[Worker, tuple[Any, ...]], Cost]:
    """The cost of a held-out wave, of which the driver gets a number for each sequence."""

    def cost(worker: Worker, args: tuple[Any, ...]) -> Cost:
        sequences = worker.size_of(args[1])
        return seconds(worker.costs, sequences), [1.0] * sequences, 0

    return cost


def _miss(worker: Worker, args: tuple[Any, ...]) -> Cost:
    sequences = worker.size_of(args[1])
    return worker.changing.miss(sequences), [1.0] * sequences, 0


def _correct(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, reports, count = _solve(worker, args)
    return worker.costs.correct(worker.costs.task.model.inputs[args[1]]), reports, count


def _lend(worker: Worker, args: tuple[Any, ...]) -> Cost:
    sequences = len(args[2])
    return worker.costs.take(sequences), None, worker.costs.wave_bytes(sequences)


def _reconstruct(worker: Worker, args: tuple[Any, ...]) -> Cost:
    _, batches, _, names = args
    return worker.changing.train(len(batches), _inputs_of(worker, names)), dict.fromkeys(names, 0), 0


def _copy_all(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return sum(worker.costs.copy(one) for one in worker.costs.task.model.inputs), None, 0


def _copy(worker: Worker, args: tuple[Any, ...]) -> Cost:
    worker.remembered = set(args[1])
    return _copied(worker), None, 0


def _put_back(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return _copied(worker), None, 0


def _copied(worker: Worker) -> float:
    return sum(worker.costs.copy(one) for one in _inputs_of(worker, worker.remembered))


def _solve(worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, place, _ = args
    names = worker.costs.task.model.skeleton.family.kinds[index].inputs[place]
    reports = [ProjectionReport(index, name, target=0.0, zeros=0, zeros_before=0, weights=1) for name in names]
    return worker.costs.solve(worker.costs.task.model.inputs[place]), reports, 0


def _solved(worker: Worker, args: tuple[Any, ...]) -> Cost:
    inputs = _inputs_of(worker, args[1])
    count = sum(worker.costs.projections_bytes(one) for one in inputs)
    return sum(worker.costs.solved(one) for one in inputs), args[1], count


def _install(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return sum(worker.costs.install(one) for one in _inputs_of(worker, args[1].value)), None, 0


def _outliers(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.outliers(), Outliers(0.0, {}), 0


def _write(worker: Worker, args: tuple[Any, ...]) -> Cost:
    """The copy on the host; the file is there later."""
    seconds = worker.changing.unload()
    worker.file = worker.now + seconds + worker.changing.write()
    return seconds, None, 0


def _written(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return max(0.0, worker.file - worker.now), 0, 0


def _tallies(worker: Worker, args: tuple[Any, ...]) -> Cost:
    """Numbers for each expert, the same of every wave."""
    return 0.0, repeat(torch.zeros(len(SUMS) + 1, worker.costs.task.model.shape.experts, dtype=torch.float64)), 0


def _outputs(worker: Worker, args: tuple[Any, ...]) -> Cost:
    """Sums of a vector for each expert."""
    model = worker.costs.task.model
    sums = torch.zeros(model.shape.experts, model.hidden, dtype=torch.float64)
    return 0.0, (sums, 1), sums.nbytes


def _finish_copy(worker: Worker, args: tuple[Any, ...]) -> Cost:
    if worker.costs.task.in_turn:
        worker.held.discard(args[0])
        worker.cut.add(args[0])
    return 0.0, None, 0


def _cut(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.cut(), None, 0


def _ratios(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return worker.costs.ratios(), [1.0] * worker.costs.task.model.shape.experts, 0


def _copy_layer(worker: Worker, args: tuple[Any, ...]) -> Cost:
    fewer = worker.costs.task.model.fewer
    assert fewer is not None
    return worker.costs.copy_layer(), int(fewer.layer * fewer.in_files), 0


def _release(worker: Worker, args: tuple[Any, ...]) -> Cost:
    if worker.costs.setup.streamed:
        worker.held.clear()
        worker.frame.clear()
        worker.ahead = None
    return 0.0, None, 0


def _free(worker: Worker, args: tuple[Any, ...]) -> Cost:
    return 0.0, None, 0


@dataclass(frozen=True)
class Row:
    """What a call of a verb takes.

    `reads` says which layers are read unless they are in memory: the one that the call is about, all of the shard, or
    those of the shard that a wave goes through. `frame` is the part of the frame that is read likewise. Calls of all
    replicas that make up a `chain`, summing or spreading, begin and end together; their bytes go from rank to rank.
    """

    cost: Callable[[Worker, tuple[Any, ...]], Cost] = _free
    reads: Literal["nothing", "layer", "shard", "passed"] = "nothing"
    frame: Literal["embedding", "head"] | None = None
    chain: Literal["summing", "spreading"] | None = None

    def layers(self, worker: Worker, verb: Callable[..., Any], args: tuple[Any, ...]) -> list[int]:
        """The layers that a call reads unless they are in memory."""
        if self.reads == "layer":
            index = layer_of(verb, args)
            assert index is not None, "the verb is about no layer"
            return [index]
        if self.reads == "passed":
            return [layer for layer in worker.layers if layer < args[4]]
        return list(worker.layers) if self.reads == "shard" else []


ROWS: dict[Callable[..., Any], Row] = {
    ForwardWorker.load: Row(reads="shard"),
    ForwardWorker.embed: Row(_embed, frame="embedding"),
    ForwardWorker.forward: Row(_forward, reads="passed"),
    ForwardWorker.put: Row(_put),
    ForwardWorker.take: Row(_take),
    ForwardWorker.propagate: Row(_propagate, reads="layer"),
    ForwardWorker.losses: Row(_losses, frame="head"),
    ForwardWorker.fork: Row(_fork),
    ForwardWorker.discard: Row(),
    ForwardWorker.drop: Row(),
    ForwardWorker.release: Row(_release),
    ForwardWorker.accumulate: Row(_accumulate, reads="layer"),
    ForwardWorker.hand_out: Row(_hand_out),
    ForwardWorker.merge: Row(_merge),
    ForwardWorker.sum_up: Row(_sum_up, chain="summing"),
    ForwardWorker.outliers: Row(_outliers, reads="layer"),
    NarrowedLayers.narrow: Row(_narrow, reads="layer"),
    NarrowedLayers.choice: Row(_choice),
    NarrowedLayers.install_narrowed: Row(_install_narrowed, reads="layer"),
    PruneWorker.sizes: Row(_sizes, reads="layer"),
    PruneWorker.draw_labels: Row(_draw_labels, frame="head"),
    PruneWorker.backward: Row(_backward, reads="shard"),
    PruneWorker.differentiate: Row(_of_wave(Costs.differentiate), reads="layer"),
    PruneWorker.begin_curves: Row(_begin_curves),
    PruneWorker.gather: Row(_of_wave(Costs.gather), reads="layer"),
    PruneWorker.gathered: Row(),
    PruneWorker.measure_curves: Row(_measure_curves, reads="layer"),
    PruneWorker.hold_out: Row(_hold_out, reads="layer"),
    PruneWorker.solve: Row(_solve, reads="layer"),
    ImprovingWorker.aim: Row(_judge(Costs.aim), reads="layer"),
    ImprovingWorker.miss: Row(_miss, reads="layer"),
    ImprovingWorker.lend: Row(_lend),
    ImprovingWorker.reconstruct: Row(_reconstruct, reads="layer"),
    ImprovingWorker.remember: Row(_copy, reads="layer"),
    ImprovingWorker.put_back: Row(_put_back, reads="layer"),
    PruneWorker.keep_dense: Row(_copy_all, reads="layer"),
    PruneWorker.confront: Row(_confront, reads="layer"),
    PruneWorker.correct: Row(_correct, reads="layer"),
    ImprovingWorker.solved: Row(_solved, reads="layer"),
    ImprovingWorker.install: Row(_install, reads="layer"),
    ImprovingWorker.broadcast: Row(_broadcast, reads="layer", chain="spreading"),
    PruneWorker.write: Row(_write, reads="layer"),
    PruneWorker.written: Row(_written),
    PruneWorker.finish: Row(_finish),
    ExpertWorker.tallies: Row(_tallies),
    ExpertWorker.outputs: Row(_outputs),
    ExpertWorker.ratios: Row(_ratios),
    ExpertWorker.write: Row(_copy_layer),
    ExpertWorker.tally: Row(_of_wave(Costs.tally), reads="layer"),
    ExpertWorker.cut: Row(_cut),
    ExpertWorker.finish: Row(_finish_copy),
    # Accounts are no work, and not verbs.
    ForwardWorker.account: Row(),
}

# A simulated run evaluates no tasks and rebuilds no masks; what a group of actors calls itself,
# for tensors on their way, takes the time until they arrive.
NOT_SIMULATED: frozenset[Callable[..., Any]] = frozenset(
    {
        ForwardWorker.log_likelihoods,
        ForwardWorker.send,
        ForwardWorker.receive,
        PruneWorker.compare,
        PruneWorker.rebuild,
        PruneWorker.measure,
    }
)


def _sums_of(worker: Worker, index: int, name: str) -> tuple[Costs, Input, bool] | None:
    """The costs of sums of a layer with a name, their input, and whether they are those of differences; None of
    vectors, such as of a layer that is only observed, which take no time."""
    gathered = index in worker.gathered
    if index not in worker.summed and not gathered:
        return None
    costs = worker.costs.of_curves if gathered else worker.costs
    if known := worker.costs.task.model.shape.by_first.get(name):
        return costs, known, False
    for one in worker.costs.task.model.inputs:
        first = next(iter(one.rows))
        if name == gradients_of(first):
            return None
        if name == differences_of(first):
            return costs, one, True
    raise KeyError(name)


def _inputs_of(worker: Worker, names: Collection[str]) -> list[Input]:
    """The inputs of the layer in work that projections, or routers, of some names read."""
    shape = worker.changing.task.model.shape
    return [one for one in (*shape.inputs, *shape.routers) if not one.rows.keys().isdisjoint(names)]
