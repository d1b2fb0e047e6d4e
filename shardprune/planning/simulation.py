"""The driver itself on workers that only know how long everything takes.

`SimulatedGroup` stands where Ray's actors stand, so that passes, pruning, replicas, lanes and what is in flight follow
the rules of `shardprune.cluster` because they are its code. A call starts when its worker has done all that was asked
of it before, when its arguments have arrived and when the driver has sent it; a worker serves calls in the order of
their sending, so that every call's times are known as soon as it is sent and no queue of events is needed. The driver's
clock moves when it waits for a value; lanes that go side by side share no shard, so that each has a clock of its own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from shardprune.cluster.error_curves import differentiate, measure
from shardprune.cluster.expert_propagation import Training, remove_in_turn
from shardprune.cluster.expert_statistics import routed_statistics, weight_ratios
from shardprune.cluster.expert_writing import write_layers
from shardprune.cluster.group import Ref
from shardprune.cluster.observing import Observation, observe
from shardprune.cluster.passes import Waves, load, perplexity
from shardprune.cluster.pending_work import PendingWork
from shardprune.cluster.pruning import prune_segments
from shardprune.model.pruning_job import Shapes
from shardprune.model.structure.shape import widths_of
from shardprune.planning.costs import Costs
from shardprune.planning.hardware import CALL_SECONDS, SUBMIT_SECONDS
from shardprune.planning.simulated_verbs import ROWS
from shardprune.planning.simulated_worker import Call, Worker
from shardprune.planning.workload import Model
from shardprune.report.progress import Reporter
from shardprune.shard.verbs import kind_of, layer_of
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.error_curves import LEVELS
from shardprune.solvers.methods import DAMPING
from shardprune.storage.records import KeptExperts, LayerRecord


class SimulatedGroup:
    """Workers [shard][replica] as the driver sees them."""

    concurrent = True

    def __init__(self, costs: Costs) -> None:
        self.costs, places = costs, costs.places
        self.setup, self.task = costs.setup, costs.task
        layout = self.setup.layout
        self._sizes: dict[int, int] = {}  # sequences of the waves that are on their way
        self.workers = {
            (shard, replica): Worker(costs, self._sizes, tuple(layout.shards[shard]))
            for shard in range(len(layout.shards))
            for replica in range(layout.replicas)
        }
        nodes = {key: places.node(*key) for key in self.workers}
        shards_on = {node: len({key[0] for key in nodes if nodes[key] == node}) for node in set(nodes.values())}
        self._nodes, self._shards_on = nodes, shards_on
        self._chains: dict[tuple[Any, ...], tuple[float, int]] = {}  # begin, and calls that have not come
        self._link_free: dict[tuple[int, int], float] = {}
        self._clocks: dict[int, float] = {}  # of the driver; of its lanes by shard, where several go side by side
        self._lanes = False
        self._floor = 0.0  # where clocks start
        self._lock = threading.Lock()
        self.between_nodes = 0  # bytes
        self.between_workers = 0
        self.read = 0.0  # bytes of models, by all workers
        self.written = 0.0
        self.phases: dict[str, float] = {}

    # -- what the driver calls ----------------------------------------------------------------------------------

    def submit(self, shard: int, replica: int, verb: Callable[..., Any], *args: Any) -> Call:
        worker = self.workers[shard, replica]
        sent = self._advance(shard, self._clock(shard) + SUBMIT_SECONDS)
        start = max(sent + CALL_SECONDS, worker.free)
        if kind_of(verb) and (index := layer_of(verb, args)) is not None:
            worker.costs = self.costs.at(index)
        for argument in args:
            if isinstance(argument, Call):
                start = max(start, self._arrival(argument, (shard, replica)))
        ready = self._ready(worker, verb, args, start)
        worker.now = ready
        seconds, value, count = ROWS[verb].cost(worker, args)
        if kind := ROWS[verb].chain:
            ready = self._meet(kind, verb, args, ready, count)
        worker.free = ready + seconds
        worker.busy += seconds
        worker.reading += ready - start if not kind else 0.0
        if ready + seconds > start:
            if not kind:
                worker.note(start, ready, "read", "read")
            worker.note(ready, worker.free, verb.__name__, kind_of(verb))
        return Call(worker.free, value, count, (shard, replica))

    def get(self, ref: Ref[Any]) -> Any:
        assert isinstance(ref, Call)
        self._advance(ref.source[0], max(self._clock(ref.source[0]), ref.done))
        return ref.value

    def ranks(self, shard: int, replicas: Sequence[int]) -> tuple[int, ...] | None:
        if not self.setup.joined:
            return None
        return tuple(self.costs.places.rank(shard, replica) for replica in replicas)

    def close(self) -> None:
        pass

    @contextmanager
    def phase(self, name: str, lanes: bool = False) -> Iterator[None]:
        """Note when a phase of the run begins and ends; in it, `lanes` may go side by side."""
        started, self._lanes = self._floor, lanes
        self._clocks.clear()
        yield
        self._floor = max(started, *self._clocks.values(), *(worker.free for worker in self.workers.values()))
        self.phases[name] = self.phases.get(name, 0.0) + self._floor - started

    @property
    def seconds(self) -> float:
        """The simulated time at the end of the last phase."""
        return self._floor

    # -- inside -------------------------------------------------------------------------------------------------

    def _clock(self, shard: int) -> float:
        return self._clocks.get(shard if self._lanes else 0, self._floor)

    def _advance(self, shard: int, time: float) -> float:
        self._clocks[shard if self._lanes else 0] = time
        return time

    def _meet(self, kind: str, verb: Callable[..., Any], args: tuple[Any, ...], ready: float, count: int) -> float:
        """When the calls of a chain begin: as soon as all its workers have done what came before.

        They are sent together, so that what comes before is known of all when the first one is sent.
        """
        ranks, end = args[-2], args[-1]
        with self._lock:
            if (verb, args) not in self._chains:
                free = [self.workers[divmod(rank, self.setup.layout.replicas)].free for rank in ranks]
                self._chains[verb, args] = max(ready, *free), len(ranks)
                at = ranks.index(end)
                chain = [*ranks, end] if kind == "summing" else [*ranks[at:], *ranks[:at]]
                self.between_workers += count * sum(one != other for one, other in pairwise(chain))
                self.between_nodes += count * self.costs.borders(chain)
            begins, left = self._chains.pop((verb, args))
            if left > 1:
                self._chains[verb, args] = begins, left - 1
        return max(begins, ready)

    def _arrival(self, call: Call, target: tuple[int, int]) -> float:
        """When a call's result is on the node of a worker; a node fetches it once, one result after the other."""
        node, joined = self._nodes[target], self.setup.joined
        with self._lock:
            if call.source != target:
                self.between_workers += call.count
            if not call.count or call.source == target:
                return call.done
            if node == self._nodes[call.source]:
                return call.done + (call.count / self.costs.row.peer if joined else 0.0)
            if node not in call.arrived:
                self.between_nodes += call.count
                link = target[0], node
                rate = self.costs.row.network / self._shards_on[node]
                begun = max(call.done, self._link_free.get(link, 0.0))
                call.arrived[node] = self._link_free[link] = begun + call.count / rate
            return call.arrived[node]

    def _ready(self, worker: Worker, verb: Callable[..., Any], args: tuple[Any, ...], start: float) -> float:
        """When the layers and the parts of the frame that a call needs are in memory."""
        row = ROWS[verb]
        for layer in row.layers(worker, verb, args):
            start = self._read_layer(worker, layer, start)
        if row.frame and row.frame not in worker.frame:
            worker.frame.add(row.frame)
            elements = self.task.model.embedding if row.frame == "embedding" else self.task.model.head
            start += self.costs.read(elements)
            with self._lock:
                self.note_read(elements)
        return start

    def _read_layer(self, worker: Worker, layer: int, now: float) -> float:
        """As `shardprune.shard.layers`: resident layers stay, of streamed ones the next is read ahead."""
        if layer in worker.held:
            return now
        seconds = self.costs.read(self._elements(worker, layer))
        step = -1 if layer + 1 in worker.held else 1
        if not self.setup.streamed:
            self._count(worker, layer)
            worker.held.add(layer)
            return now + seconds
        ahead, worker.ahead = worker.ahead, None
        if ahead:
            now = max(now, ahead[1])
        if not ahead or ahead[0] != layer:
            self._count(worker, layer)
            now += seconds
        worker.held = {layer}
        if (following := layer + step) in worker.layers:
            self._count(worker, following)
            worker.ahead = (following, now + self.costs.read(self._elements(worker, following)))
        return now

    def _count(self, worker: Worker, layer: int) -> None:
        """Count a layer as read."""
        with self._lock:
            self.note_read(self._elements(worker, layer))

    def _elements(self, worker: Worker, layer: int) -> int:
        """Return the elements of a layer as it is now."""
        model = self.task.model.at(layer)
        return model.left.layer if model.left and layer in worker.cut else model.layer

    def begin(self, costs: Costs) -> None:
        """Begin another run with the same layout, whose workers start where those of the one before end."""
        self.costs, self.task = costs, costs.task
        for worker in self.workers.values():
            worker.begin(costs)
            worker.free = self._floor
        self._link_free.clear()
        self.phases = {"structure": self.seconds}

    def note_read(self, elements: int) -> None:
        """Count weights of the model as read."""
        self.read += elements * self.task.model.in_files

    def note_waves(self, waves: Waves) -> None:
        """Learn how many sequences the waves have that are on their way next."""
        self._sizes.clear()
        self._sizes.update({wave.index: wave.stop - wave.start for wave in waves.all})


def _shapes(model: Model) -> Shapes:
    """Return [rows, cols] of every projection, by layer."""
    return [
        {name: (rows, one.cols) for one in shape.inputs for name, rows in one.rows.items()} for shape in model.shapes
    ]


def _measure_curves(group: SimulatedGroup, output: Reporter) -> None:
    """Measure error curves, which are of no use to anyone."""
    task, setup = group.task, group.setup
    layout, model = setup.layout, task.model
    family = model.skeleton.family
    waves = Waves(torch.empty(task.curve_windows, task.seqlen, device="meta"), layout.replicas, task.wave)
    group.note_waves(waves)
    with group.phase("curves"), output.step("curves", 0) as step:
        differentiate(group, layout, waves, setup.streamed, step)
    with group.phase("curves", lanes=len(layout.shards) > 1), output.step("curves", 0) as step:
        measure(group, layout, waves, family, _shapes(model), [0.5] * LEVELS, DAMPING, step)


def _remove_experts(group: SimulatedGroup, fewer: Model, calibration: Waves, output: Reporter) -> None:
    """Look at the experts of the dense model, or at their weights, and copy every layer without those that go, trained
    where that is asked for."""
    layout, model, task = group.setup.layout, group.task.model, group.task
    mixtures = [index for index, shape in enumerate(model.shapes) if shape.experts]
    copied = (model if task.merged else fewer).shapes
    group.note_read(sum(shape.elements for shape in copied))
    if task.improving:  # every replica builds the layers that it trains
        group.note_read(layout.replicas * sum(copied[index].elements for index in mixtures))
    if not task.behind:
        with group.phase("observe"), output.step("observe", 0) as step:
            if task.scores == "pass":
                waves = Waves(calibration.tokens, layout.replicas, task.wave)  # none is held out yet
                group.note_waves(waves)
                routed_statistics(group, layout, waves, mixtures, group.setup.streamed, task.merged, step)
            elif task.scores == "weights":
                weight_ratios(group, layout, mixtures, step)
                group.note_read(sum(model.shapes[index].expert_weights for index in mixtures))
    if not task.in_turn:
        with group.phase("write"), output.step("remove experts", 0) as step:
            write_layers(group, layout, {index: LayerRecord(index) for index in range(model.layers)}, step)
        return
    group.note_waves(calibration)
    kinds = fewer.skeleton.family.kinds

    def names(training: str, index: int) -> tuple[str, ...]:
        routers = fewer.shapes[index].routers
        return tuple(name for one in routers for name in one.rows) if training == "router" else kinds[index].projections

    def record(index: int) -> LayerRecord:
        before, after = model.shapes[index].experts, fewer.shapes[index].experts
        return LayerRecord(index, experts=KeptExperts(tuple(range(after)), before) if before else None)

    training = Training(task.trainings, names) if task.improving else None
    unknown = set(mixtures if task.behind else ())
    with group.phase("prune"), output.step("remove experts", 0) as step:
        remove_in_turn(group, layout, calibration, (), unknown, task.merged, lambda *_: None, record, training, step)


def simulate(*runs: Costs) -> SimulatedGroup:
    """Carry out runs, one after the other, on workers that only take time."""
    group = SimulatedGroup(runs[0])
    _carry_out(group)
    for costs in runs[1:]:
        group.begin(costs)
        _carry_out(group)
    return group


def _carry_out(group: SimulatedGroup) -> None:
    """Measure, find an allocation and prune, or remove experts or structures, measure again."""
    task, setup = group.task, group.setup
    layout, model = setup.layout, task.model
    output = Reporter(quiet=True)
    windows = torch.empty(task.samples, task.seqlen, device="meta")
    calibration = Waves(windows, layout.replicas, task.wave, task.held_out)
    measured = Waves(torch.empty(task.windows, task.seqlen, device="meta"), layout.replicas, task.wave)
    before, after = task.passes

    def measure(passes: int) -> None:
        group.note_waves(measured)
        for _ in range(passes):
            with group.phase("evaluate"), output.step("perplexity", 0) as step:
                perplexity(group, layout, measured, "latest", setup.streamed, step)

    if not setup.streamed and not model.fewer:
        with group.phase("load"):
            load(group, layout, "latest")
    measure(before)
    if task.curves:
        _measure_curves(group, output)
    group.note_waves(calibration)
    if model.fewer:
        _remove_experts(group, model.fewer, calibration, output)
    else:
        _prune(group, calibration, output)
    measure(after)
    stored = model.in_files if model.fewer else task.stored  # tensors are copied where experts go
    group.written += (model.left or model).parameters * stored


def _prune(group: SimulatedGroup, calibration: Waves, output: Reporter) -> None:
    """Observe what segments begin with and what an allocation looks at, and zero weights or remove structures."""
    task, setup = group.task, group.setup
    layout, model = setup.layout, task.model
    starts = tuple(segment.start for segment in layout.segments if segment.start)
    family = model.skeleton.family
    inputs = [kind.input_names for kind in family.kinds]
    observation = Observation(starts, 5.0 if task.outliers else None)
    if observation:
        with group.phase("observe"), output.step("observe", 0) as step:
            observe(group, layout, calibration, observation, inputs, setup.streamed, step)
    shares = {(layer, name): Share(0.5) for layer, kind in enumerate(family.kinds) for name in kind.projections}
    work = PendingWork(
        shares,
        frozenset(),
        family,
        _shapes(model),
        [],
        None,
        task.errors,
        widths=widths_of(model.narrower.skeleton.config) if model.narrower else None,
        passes_on_dense=task.passes_on_dense,
        effort=task.effort,
        improving=task.improving,
        chunks=setup.chunks,
    )
    with group.phase("prune", lanes=len(layout.lanes()) > 1), output.step("prune", 0) as step:
        prune_segments(group, layout, calibration, work, step)
