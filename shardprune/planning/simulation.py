"""The driver itself on workers that only know how long everything takes.

`SimulatedGroup` stands where Ray's actors stand, so that passes, pruning, replicas, lanes and what is in flight follow
the rules of `shardprune.cluster` because they are its code. A call starts when its worker has done all that was asked
of it before, when its arguments have arrived and when the driver has sent it; a worker serves calls in the order of
their sending, so that every call's times are known as soon as it is sent and no queue of events is needed. The driver's
clock moves when it waits for a value; lanes that go side by side share no shard, so that each has a clock of its own.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from shardprune.cluster.group import Ref
from shardprune.cluster.observing import Observation, observe
from shardprune.cluster.passes import Waves, load, perplexity
from shardprune.cluster.pruning import prune_segments
from shardprune.cluster.pruning_job import Work
from shardprune.planning.costs import Costs
from shardprune.planning.hardware import CALL_SECONDS, SUBMIT_SECONDS
from shardprune.planning.workload import Input
from shardprune.report.progress import Reporter
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.ledger import Kind
from shardprune.shard.narrowed_layers import NarrowedLayers
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.verbs import kind_of, layer_of
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.outliers import Outliers
from shardprune.storage.records import ProjectionReport


@dataclass
class Call(Ref[Any]):
    """One call: when it was `done`, the value that the driver gets, and what travels to other workers."""

    done: float
    value: Any = None
    count: int = 0
    source: tuple[int, int] = (0, 0)
    arrived: dict[int, float] = field(default_factory=dict)  # by node


@dataclass
class Stretch:
    """The time in which a worker does nothing but calls of one verb, or reads: simulated seconds."""

    start: float
    end: float
    verb: str
    kind: Kind


@dataclass
class Worker:
    """One worker's clock, its layers, and what it did."""

    layers: tuple[int, ...]
    free: float = 0.0
    held: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)  # layers over whose inputs it has sums, for solving
    ahead: tuple[int, float] | None = None  # the layer that is being read, and when it is there
    frame: set[str] = field(default_factory=set)
    spans: list[Stretch] = field(default_factory=list)
    busy: float = 0.0
    reading: float = 0.0


class SimulatedGroup:
    """Workers [shard][replica] as the driver sees them."""

    concurrent = True

    def __init__(self, costs: Costs) -> None:
        self.costs, places = costs, costs.places
        self.setup, self.task = costs.setup, costs.task
        layout = self.setup.layout
        self.workers = {
            (shard, replica): Worker(tuple(layout.shards[shard]))
            for shard in range(len(layout.shards))
            for replica in range(layout.replicas)
        }
        nodes = {key: places.node(*key) for key in self.workers}
        shards_on = {node: len({key[0] for key in nodes if nodes[key] == node}) for node in set(nodes.values())}
        self._nodes, self._shards_on = nodes, shards_on
        self._link_free: dict[tuple[int, int], float] = {}
        self._clocks: dict[int, float] = {}  # of the driver; of its lanes by shard, where several go side by side
        self._lanes = False
        self._floor = 0.0  # where clocks start
        self._lock = threading.Lock()
        self.between_nodes = 0  # bytes
        self.between_workers = 0
        self.read = 0  # elements of weights, by all workers
        self.phases: dict[str, float] = {}

    # -- what the driver calls ----------------------------------------------------------------------------------

    def submit(self, shard: int, replica: int, verb: Callable[..., Any], *args: Any) -> Call:
        worker = self.workers[shard, replica]
        sent = self._advance(shard, self._clock(shard) + SUBMIT_SECONDS)
        start = max(sent + CALL_SECONDS, worker.free)
        for argument in args:
            if isinstance(argument, Call):
                start = max(start, self._arrival(argument, (shard, replica)))
        ready = self._ready(worker, verb, args, start)
        seconds, value, count = ROWS[verb].cost(self, worker, args)
        worker.free = ready + seconds
        worker.busy += seconds
        worker.reading += ready - start
        if ready + seconds > start:
            self._note(worker, start, ready, "read", "read")
            self._note(worker, ready, worker.free, verb.__name__, kind_of(verb))
        return Call(worker.free, value, count, (shard, replica))

    def get(self, ref: Ref[Any]) -> Any:
        assert isinstance(ref, Call)
        self._advance(ref.source[0], max(self._clock(ref.source[0]), ref.done))
        return ref.value

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

    def _arrival(self, call: Call, target: tuple[int, int]) -> float:
        """When a call's result is on the node of a worker; a node fetches it once, one result after the other."""
        node = self._nodes[target]
        with self._lock:
            if call.source != target:
                self.between_workers += call.count
            if not call.count or node == self._nodes[call.source]:
                return call.done
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
                self.read += elements
        return start

    def _read_layer(self, worker: Worker, layer: int, now: float) -> float:
        """As `shardprune.shard.layers`: resident layers stay, of streamed ones the next is read ahead."""
        if layer in worker.held:
            return now
        seconds = self.costs.read(self.task.model.layer)
        if not self.setup.streamed:
            self._count_layer()
            worker.held.add(layer)
            return now + seconds
        ahead, worker.ahead = worker.ahead, None
        if ahead:
            now = max(now, ahead[1])
        if not ahead or ahead[0] != layer:
            self._count_layer()
            now += seconds
        worker.held = {layer}
        if layer + 1 in worker.layers:
            self._count_layer()
            worker.ahead = (layer + 1, now + seconds)
        return now

    def _count_layer(self) -> None:
        with self._lock:
            self.read += self.task.model.layer

    def _size(self, wave: int) -> int:
        return self.sizes[wave]

    def note_waves(self, waves: Waves) -> None:
        """Learn how many sequences the waves have that are on their way next."""
        self.sizes = {wave.index: wave.stop - wave.start for wave in waves.all}

    @staticmethod
    def _note(worker: Worker, start: float, end: float, verb: str, kind: Kind | None) -> None:
        if end <= start:
            return
        assert kind is not None, f"{verb} takes time and is no verb"
        last = worker.spans[-1] if worker.spans else None
        if last and last.verb == verb and start - last.end < 1e-9:
            last.end = end
        else:
            worker.spans.append(Stretch(start, end, verb, kind))


# A call's seconds, its value for the driver, and the bytes of its result where it travels.
Cost = tuple[float, Any, int]


def _embed(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    sequences = len(args[0])
    return group.costs.embed(sequences), None, group.costs.wave_bytes(sequences)


def _forward(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    wave, _, _, record, stop, _ = args
    sequences = group._size(wave)
    layers = sum(1 for layer in worker.layers if layer < stop)
    kept = sum(group.costs.put(sequences) for layer in worker.layers if layer in record)
    return group.costs.forward(sequences, layers) + kept, None, group.costs.wave_bytes(sequences)


def _of_wave(
    seconds: Callable[[Costs, int], float], travels: bool = False
) -> Callable[[SimulatedGroup, Worker, tuple[Any, ...]], Cost]:
    def cost(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
        sequences = group._size(args[1])
        name = seconds.__name__  # of a method that a kind of costs may override
        return getattr(group.costs, name)(sequences), None, group.costs.wave_bytes(sequences) * travels

    return cost


def _losses(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    return group.costs.losses(len(args[1])), [0.0] * len(args[1]), 0


def _fork(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    return group.costs.fork(-(-group.task.samples // group.setup.layout.replicas)), None, 0


def _accumulate(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    worker.summed.add(args[2])
    return group.costs.accumulate(group._size(args[1])), None, 0


def _hand_out(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, name = args
    if index not in worker.summed:  # observed only: such sums are vectors, which take no time
        return 0.0, None, 0
    one = _input_of(group, name)
    return group.costs.statistics(one), None, group.costs.sums_bytes(one)


def _merge(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, name, *parts = args
    return group.costs.merge(_input_of(group, name), len(parts)) if index in worker.summed else 0.0, None, 0


def _finish(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    worker.summed.clear()
    return 0.0, None, 0


def _solve(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    index, place, _ = args
    names = group.task.model.skeleton.family.inputs[place]
    reports = [ProjectionReport(index, name, target=0.0, zeros=0, zeros_before=0, weights=1) for name in names]
    return group.costs.solve(group.task.model.inputs[place]), reports, 0


def _solved(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    one = _input_of(group, args[1][0])
    return group.costs.solved(one), args[1], group.costs.projections_bytes(one)


def _install(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    return group.costs.install(_input_of(group, args[1].value[0])), None, 0


def _outliers(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    return group.costs.outliers(), Outliers(0.0, {}), 0


def _write(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    return group.costs.write(), None, 0


def _release(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    if group.setup.streamed:
        worker.held.clear()
        worker.frame.clear()
        worker.ahead = None
    return 0.0, None, 0


def _free(group: SimulatedGroup, worker: Worker, args: tuple[Any, ...]) -> Cost:
    return 0.0, None, 0


@dataclass(frozen=True)
class Row:
    """What a call of a verb takes.

    `reads` says which layers are read unless they are in memory: the one that the call is about, all of the shard, or
    those of the shard that a wave goes through. `frame` is the part of the frame that is read likewise.
    """

    cost: Callable[[SimulatedGroup, Worker, tuple[Any, ...]], Cost] = _free
    reads: Literal["nothing", "layer", "shard", "passed"] = "nothing"
    frame: Literal["embedding", "head"] | None = None

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
    ForwardWorker.put: Row(_of_wave(Costs.put)),
    ForwardWorker.take: Row(_of_wave(Costs.take, travels=True)),
    ForwardWorker.propagate: Row(_of_wave(Costs.propagate), reads="layer"),
    ForwardWorker.losses: Row(_losses, frame="head"),
    ForwardWorker.fork: Row(_fork),
    ForwardWorker.discard: Row(),
    ForwardWorker.drop: Row(),
    ForwardWorker.release: Row(_release),
    ForwardWorker.accumulate: Row(_accumulate, reads="layer"),
    ForwardWorker.hand_out: Row(_hand_out),
    ForwardWorker.merge: Row(_merge),
    ForwardWorker.outliers: Row(_outliers, reads="layer"),
    PruneWorker.solve: Row(_solve, reads="layer"),
    PruneWorker.solved: Row(_solved, reads="layer"),
    PruneWorker.install: Row(_install, reads="layer"),
    PruneWorker.write: Row(_write, reads="layer"),
    PruneWorker.finish: Row(_finish),
    # Accounts are no work, and not verbs.
    ForwardWorker.account: Row(),
}

# A simulated run evaluates no tasks, rebuilds no masks and removes no structures.
NOT_SIMULATED: frozenset[Callable[..., Any]] = frozenset(
    {
        ForwardWorker.log_likelihoods,
        NarrowedLayers.narrow,
        NarrowedLayers.choice,
        NarrowedLayers.install_narrowed,
        PruneWorker.compare,
        PruneWorker.rebuild,
        PruneWorker.measure,
        PruneWorker.sizes,
    }
)


def _input_of(group: SimulatedGroup, name: str) -> Input:
    """The input whose first projection has a name."""
    return next(one for one in group.task.model.inputs if next(iter(one.rows)) == name)


def simulate(costs: Costs) -> SimulatedGroup:
    """Carry out a run on workers that only take time: measure, observe, prune, measure again."""
    task, setup = costs.task, costs.setup
    layout, model = setup.layout, task.model
    group = SimulatedGroup(costs)
    output = Reporter(quiet=True)
    calibration = Waves(torch.empty(task.samples, task.seqlen, device="meta"), layout.replicas, task.wave)
    windows = Waves(torch.empty(task.windows, task.seqlen, device="meta"), layout.replicas, task.wave)

    def measure() -> None:
        group.note_waves(windows)
        for _ in range(task.sources):
            with group.phase("evaluate"), output.step("perplexity", 0) as step:
                perplexity(group, layout, windows, "latest", setup.streamed, step)

    if not setup.streamed:
        with group.phase("load"):
            load(group, layout, "latest")
    measure()
    group.note_waves(calibration)
    starts = tuple(segment.start for segment in layout.segments if segment.start)
    observation = Observation(starts, 5.0 if task.outliers else None)
    inputs = [names[0] for names in model.skeleton.family.inputs]
    if observation:
        with group.phase("observe"), output.step("observe", 0) as step:
            observe(group, layout, calibration, observation, inputs, setup.streamed, step)
    family = model.skeleton.family
    shares = {(layer, name): Share(0.5) for layer in range(model.layers) for name in family.projections}
    shapes = {name: (rows, one.cols) for one in model.inputs for name, rows in one.rows.items()}
    work = Work(shares, frozenset(), family, [shapes] * model.layers, [], None, task.errors)
    with group.phase("prune", lanes=len(layout.lanes()) > 1), output.step("prune", 0) as step:
        prune_segments(group, layout, calibration, work, step)
    measure()
    return group
