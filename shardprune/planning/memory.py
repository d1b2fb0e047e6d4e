"""How much memory a worker takes at every step of a run: which tensors are alive at the same time.

Everything is in bytes. The steps are those of `shardprune.shard`: docs/planning.md has the formulae. On a CPU there is
one memory, `device`; a GPU worker also has its process on the `host`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from shardprune.cluster.layout import Layout
from shardprune.cluster.object_store import store_bytes
from shardprune.planning.workload import Input, Task
from shardprune.solvers.outliers import BLOCK as OUTLIER_BLOCK
from shardprune.solvers.selection import SORTED
from shardprune.solvers.sparsegpt import BLOCK

CPU_PROCESS = 440 * 10**6  # Python with torch and transformers before any weight is read; measured
GPU_PROCESS = 3 * 10**9  # the same with CUDA's libraries; not measured


@dataclass(frozen=True)
class Bytes:
    """What a worker holds at one moment: `weights` of layers, embedding and head; `activations`, kept waves and the
    temporaries of one in work; `statistics`, the sums over inputs; `workspace` of a solve."""

    process: int = 0
    weights: int = 0
    activations: int = 0
    statistics: int = 0
    workspace: int = 0

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Moment:
    """One step of a phase on one worker."""

    phase: str
    step: str
    device: Bytes
    host: Bytes


@dataclass(frozen=True)
class Setup:
    """How the workers of a layout hold weights and waves."""

    layout: Layout
    streamed: bool
    waves_on_host: bool
    gpu: bool


class WorkerMemory:
    """One worker of a shard: that with the most sequences."""

    def __init__(self, task: Task, setup: Setup, shard: int) -> None:
        self.task, self.setup, self.shard = task, setup, shard
        self.model = task.model
        self.layers = setup.layout.shards[shard]
        self.first, self.last = shard == 0, shard == len(setup.layout.shards) - 1
        self.sequences = -(-task.samples // setup.layout.replicas)
        lane = setup.layout.lanes()[shard if len(setup.layout.segments) > 1 else 0]
        self.segments = len(lane)
        self.recorded = sum(1 for segment in lane if segment.start)

    def moments(self) -> Iterator[Moment]:
        """All steps at which something reaches its peak."""
        if self.task.sources:
            yield from self._evaluate()
        if self._observes():
            yield from self._observe()
        yield from self._prune()

    def peaks(self) -> dict[str, Moment]:
        """The moment of each phase at which the worker holds most, host and device together."""
        peaks: dict[str, Moment] = {}
        for moment in self.moments():
            best = peaks.get(moment.phase)
            if best is None or _total(moment) > _total(best):
                peaks[moment.phase] = moment
        return peaks

    # -- phases -----------------------------------------------------------------------------------------------

    def _evaluate(self) -> Iterator[Moment]:
        task, streamed = self.task, self.setup.streamed
        windows = task.kept_bytes(-(-task.windows // self.setup.layout.replicas)) if streamed else 0
        layers = self._held()
        if self.first:
            yield from self._embed("evaluate", windows)
        frame = 0 if streamed else self._frame(embedding=self.first, head=self.last)
        yield self._moment("evaluate", "forward", layers + frame, self._forward(), kept=windows)
        if self.last:
            # The logits of one sequence in float32, and as many log-probabilities.
            logits = 8 * task.seqlen * self.model.vocabulary + self._wave()
            weights = (self._layer() + self._frame(head=True)) if streamed else layers + frame
            yield self._reading("evaluate", "head", weights, self.model.head, self._wave(), windows)
            yield self._moment("evaluate", "logits", weights, logits, kept=windows)

    def _observe(self) -> Iterator[Moment]:
        task, streamed = self.task, self.setup.streamed
        streams = self.recorded + 1 if streamed else self.recorded
        kept = streams * task.kept_bytes(self.sequences)
        frame = 0 if streamed else self._resident_frame()
        if self.first:
            yield from self._embed("observe", kept, again=bool(task.sources))
        yield self._moment("observe", "forward", self._held() + frame, self._forward(), kept=kept)
        if task.outliers:
            # Column norms add up in float64; then a block of the metric, compared with two thresholds.
            counting = max(8 * self.model.largest, 9 * min(OUTLIER_BLOCK, self.model.largest))
            yield self._moment("observe", "ratios", self._held() + frame, workspace=counting, kept=kept)

    def _prune(self) -> Iterator[Moment]:
        task = self.task
        kept = self.segments * task.kept_bytes(self.sequences)
        resident = 0 if self.setup.streamed else self._resident_frame()
        if self.first:
            yield from self._embed("prune", kept, again=bool(task.sources) or self._observes())
        weights = self._held() + resident
        sums = sum(self._sums(one) for one in self.model.inputs)
        yield self._moment("prune", "accumulate", weights, self._forward(), sums, kept=kept)
        for place, one in enumerate(self.model.inputs):
            left = self.model.inputs[place:] if self.setup.layout.replicas == 1 else self.model.inputs
            held = sum(self._sums(other) for other in left)
            exchanged = self._sums(one) if self.setup.layout.replicas > 1 else 0
            for step, workspace in self._solve(one):
                # Replicas' sums come one after another through a copy, and add up beside the worker's own.
                copied = exchanged if self.setup.gpu and step == "merge" else 0
                statistics = held + exchanged + (0 if self.setup.gpu or not exchanged else self._mapped(one, sums))
                label = f"{step} {'/'.join(name.rpartition('.')[2].removesuffix('_proj') for name in one.rows)}"
                yield self._moment("prune", label, weights, 0, statistics, workspace + copied, kept=kept)

    # -- parts ------------------------------------------------------------------------------------------------

    def _observes(self) -> bool:
        return self.task.outliers or (len(self.setup.layout.segments) > 1 and self.model.layers > 1)

    def _embed(self, phase: str, kept: int, again: bool = False) -> Iterator[Moment]:
        """The first shard's start of a pass; `again` where an earlier one had the embedding, which resident shards
        keep."""
        weights = self._frame(embedding=True) + (0 if self.setup.streamed else self._held())
        if self.setup.streamed or not again:
            yield self._reading(phase, "embedding", weights, self.model.embedding)
        yield self._moment(phase, "embed", weights, self._wave(), kept=kept)

    def _reading(
        self, phase: str, name: str, weights: int, elements: int, temporaries: int = 0, kept: int = 0
    ) -> Moment:
        """The embedding or the head on its way: as it is stored, beside the `weights`, of which it is one."""
        return self._moment(phase, f"read {name}", weights, temporaries, kept=kept, elements=elements)

    def _solve(self, one: Input) -> Iterator[tuple[str, int]]:
        """Workspace of the steps of solving the projections that read an input, beside its sums."""
        task = self.task
        square, weights, rows = one.cols**2, one.largest, max(one.rows.values())
        dense = 4 * weights if task.itemsize != 4 else 0  # else it is the layer's own
        narrow = 2 * weights if task.stored != 4 else 0  # as it is stored
        yield "merge", 0
        factor = 0
        # Checks of the result: that it is finite, its zeros, the groups of N:M counted as int32.
        checking = (11 if task.grouped else 6) * weights
        # float32 values and int64 places, which CUDA's sort has three times; its top-k of half the entries takes less.
        sorting = (36 if self.setup.gpu else 12) * min(weights, SORTED)
        choosing = (20 if self.setup.gpu else 4) * weights
        if task.solver == "sparsegpt":
            # H and its factor; in the recursion three quarters of a matrix more.
            yield "factor", dense + 11 * square
            factor = 4 * square
            swept = factor + dense + 5 * weights  # float32 columns and their mask
            yield "sweep", swept + 20 * BLOCK * rows
            yield "check", swept + narrow + checking
        elif task.solver == "magnitude":
            yield "select", dense + 4 * weights + (sorting if task.grouped else choosing)
        else:
            if task.solver == "wanda-variant":  # sorts all at once, and has running sums in float64
                sorting = ((36 if self.setup.gpu else 12) + 28) * weights
            yield "select", dense + 4 * weights + sorting
        if task.solver != "sparsegpt":
            yield "check", dense + 5 * weights + narrow + checking
        if task.errors:
            # The change, its image under the Gram matrix twice, or once and widened to float64.
            pruned = narrow + 4 * weights
            yield "error", factor + dense + pruned + 4 * weights + 12 * weights

    def _moment(
        self,
        phase: str,
        step: str,
        weights: int,
        temporaries: int = 0,
        statistics: int = 0,
        workspace: int = 0,
        kept: int = 0,
        elements: int = 0,
    ) -> Moment:
        setup, task = self.setup, self.task
        reading = (elements or self.model.largest) * task.stored  # one tensor on its way, else a projection
        if not setup.gpu:
            read = reading if task.stored != task.itemsize else 0
            device = Bytes(CPU_PROCESS, weights + read, kept + temporaries, statistics, workspace)
            return Moment(phase, step, device, Bytes())
        kept_here, kept_there = (0, kept) if setup.waves_on_host else (kept, 0)
        if setup.waves_on_host and temporaries:
            temporaries += self._wave()
        device = Bytes(0, weights, kept_here + temporaries, statistics, workspace)
        shipped = statistics if setup.layout.replicas > 1 else 0  # copies on their way to another replica
        host = Bytes(GPU_PROCESS, reading, kept_there + 2 * self._wave(), shipped, 0)
        return Moment(phase, step, device, host)

    def _layer(self) -> int:
        return self.model.layer * self.task.itemsize

    def _held(self) -> int:
        """The layers in memory: the shard's, or one and the next."""
        return self._layer() * (min(2, len(self.layers)) if self.setup.streamed else len(self.layers))

    def _frame(self, embedding: bool = False, head: bool = False) -> int:
        model = self.model
        elements = (embedding or (head and model.tied)) * model.embedding + (head and not model.tied) * model.head
        return elements * self.task.itemsize

    def _resident_frame(self) -> int:
        """Of the frame, what stays with a resident shard once a pass has needed it."""
        return self._frame(embedding=self.first, head=self.last and bool(self.task.sources))

    def _wave(self) -> int:
        return self.task.kept_bytes(min(self.task.wave, self.sequences))

    def _forward(self) -> int:
        return self.model.forward_bytes(min(self.task.wave, self.sequences), self.task.seqlen, self.task.itemsize)

    def _mapped(self, one: Input, sums: int) -> int:
        """Pages of the object store that a CPU worker which solves an input has before it: the other replicas' sums
        of that input, and its own of all others."""
        return (self.setup.layout.replicas - 1) * self._sums(one) + sums - self._sums(one)

    def _sums(self, one: Input) -> int:
        """Of one input, float32."""
        return 0 if self.task.kind is None else 4 * one.cols ** (2 if self.task.kind == "gram" else 1)


def peaks_of(task: Task, setup: Setup) -> dict[str, Moment]:
    """Of each phase, the moment at which some worker holds most."""
    peaks: dict[str, Moment] = {}
    for shard in _kinds(setup):
        for phase, moment in WorkerMemory(task, setup, shard).peaks().items():
            if phase not in peaks or _total(moment) > _total(peaks[phase]):
                peaks[phase] = moment
    return peaks


def largest(task: Task, setup: Setup) -> tuple[Moment, Moment]:
    """The moments at which a worker holds most on its device, and on its host."""
    moments = [moment for shard in _kinds(setup) for moment in WorkerMemory(task, setup, shard).moments()]
    return max(moments, key=lambda moment: moment.device.peak), max(moments, key=lambda moment: moment.host.peak)


def node_bytes(task: Task, setup: Setup, workers: int) -> int:
    """Memory of a node that holds so many workers: their processes, and what replicas and shards have under way."""
    _, host = largest(task, setup)
    device, _ = largest(task, setup)
    own = host.host.peak if setup.gpu else device.device.peak
    sent = task.model.projections * task.itemsize if setup.layout.replicas > 1 else 0
    columns = (one.cols for one in task.model.inputs)
    return workers * own + store_bytes(setup.layout, task.kept_bytes(task.wave), columns, sent)


def _kinds(setup: Setup) -> list[int]:
    """Shards of which each other one is like another: the first, the second, one in the middle and the last."""
    shards = len(setup.layout.shards)
    return sorted({0, 1, shards // 2, shards - 1} & set(range(shards)))


def _total(moment: Moment) -> int:
    return moment.device.peak + moment.host.peak
