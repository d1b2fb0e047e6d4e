"""The bytes of what a worker has in memory whatever it does: layers, embedding and head, waves, sums over inputs."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from shardprune.planning.moments import Bytes, Moment, Setup
from shardprune.planning.shapes import Input
from shardprune.planning.workload import Task
from shardprune.shard.ledger import CALLS_AHEAD
from shardprune.solvers.statistics import Kind
from shardprune.solvers.triangles import lower_entries

CPU_PROCESS = 440 * 10**6  # Python with torch and transformers before any weight is read; measured
GPU_PROCESS = 3 * 10**9  # with CUDA's libraries; not measured
# Waves on the device that are kept on the host: those that have come for the calls that are not done, the next one,
# and images that go back.
ON_THEIR_WAY = 2 * CALLS_AHEAD + 1


class WorkerTensors:
    """The tensors of a shard's worker with the most sequences, at the layer at which the task is seen."""

    def __init__(self, task: Task, setup: Setup, shard: int) -> None:
        self.task, self.setup, self.shard = task, setup, shard
        self.model = task.model
        self.layers = setup.layout.shards[shard]
        self.first, self.last = shard == 0, shard == len(setup.layout.shards) - 1
        self.sequences = -(-task.samples // setup.layout.replicas) + bool(task.held_out)
        lane = setup.layout.lanes()[shard if len(setup.layout.segments) > 1 else 0]
        self.segments = len(lane)
        self.recorded = sum(1 for segment in lane if segment.start)

    # -- moments ----------------------------------------------------------------------------------------------

    def _embed(self, phase: str, kept: int, again: bool = False) -> Iterator[Moment]:
        """Yield the moments of a pass's start on the first shard; with `again` resident shards have the embedding
        already.
        """
        weights = self._frame(embedding=True) + (0 if self.setup.streamed else self._held())
        if self.setup.streamed or not again:
            yield self._reading(phase, "embedding", weights, self.model.embedding)
        yield self._moment(phase, "embed", weights, self._wave(), kept=kept)

    def _reading(
        self, phase: str, name: str, weights: int, elements: int, temporaries: int = 0, kept: int = 0
    ) -> Moment:
        """Return the moment of reading the embedding or the head, in the stored dtype beside the loaded `weights`."""
        return self._moment(phase, f"read {name}", weights, temporaries, kept=kept, elements=elements)

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
        away: int = 0,
    ) -> Moment:
        setup, task = self.setup, self.task
        largest = elements or self.model.largest  # of one tensor that is being read, or a projection
        reading, quantised = largest * task.stored, int(largest * task.quantised)
        if not setup.gpu:
            read = quantised + (reading if task.stored != task.itemsize else 0)
            device = Bytes(CPU_PROCESS, weights + read, kept + temporaries, statistics, workspace)
            return Moment(phase, step, device, Bytes())
        kept_here, kept_there = (0, kept) if setup.waves_on_host else (kept, 0)
        if setup.waves_on_host and temporaries:
            temporaries += ON_THEIR_WAY * self._wave()
        device = Bytes(0, weights + quantised, kept_here + temporaries, statistics, workspace)
        shipped = statistics if setup.copies_sums else 0  # copies that are being sent to another replica
        written = self._written() if phase == "prune" else 0
        host = Bytes(GPU_PROCESS, reading + written, kept_there + 2 * self._wave(), shipped, away)
        return Moment(phase, step, device, host)

    # -- tensors ----------------------------------------------------------------------------------------------

    def _layer(self) -> int:
        return self.model.layer * self.task.itemsize

    def _held(self) -> int:
        """Return the bytes of the layers in memory: the shard's, or one and the next."""
        sizes = [self.model.shapes[index].elements for index in self.layers]
        if self.setup.streamed and len(sizes) > 1:
            return max(map(sum, pairwise(sizes))) * self.task.itemsize
        return sum(sizes) * self.task.itemsize

    def _written(self) -> int:
        """Return the bytes of the layer before the one in work, whose file is being written: its copy in the stored
        dtype, or on a CPU that computes in it the layer itself, which resident weights have anyway.
        """
        setup, task = self.setup, self.task
        if setup.gpu or task.stored != task.itemsize:
            return self.model.layer * task.stored if len(self.layers) > 1 else 0
        return self._layer() if setup.streamed and len(self.layers) > 2 else 0

    def _frame(self, embedding: bool = False, head: bool = False) -> int:
        model = self.model
        elements = (embedding or (head and model.tied)) * model.embedding + (head and not model.tied) * model.head
        return elements * self.task.itemsize

    def _resident_frame(self) -> int:
        """Return the bytes of the frame that stay on a resident shard after the first pass."""
        judged = bool(self.task.passes[0]) or self.task.curves
        return self._frame(embedding=self.first, head=self.last and judged)

    def _wave(self) -> int:
        return self.task.kept_bytes(min(self.task.wave, self.sequences))

    def _forward(self) -> int:
        return self.model.forward_bytes(min(self.task.wave, self.sequences), self.task.seqlen, self.task.itemsize)

    def _mapped(self, one: Input, inputs: Sequence[Input]) -> int:
        """Return the bytes of the object store mapped by a CPU worker that solves one of some inputs: the other
        replicas' sums of that input, and its own of all others.
        """
        own = sum(self._sent(other) for other in inputs if other is not one)
        return (self.setup.layout.replicas - 1) * self._sent(one) + own

    def _sent(self, one: Input) -> int:
        """Return the bytes of one input's float32 sums as replicas exchange them."""
        kinds = 2 if self.task.improving.measured else 1
        return 4 * kinds * lower_entries(one.cols) if self.task.kind_of(one) == "gram" else self._sums(one)

    def _sums(self, one: Input) -> int:
        """Return the bytes of one input's float32 sums, with those over held-out windows where these choose."""
        return self._sums_of(one.cols, self.task.kind_of(one))

    def _sums_of(self, cols: int, kind: Kind | None) -> int:
        kinds = 2 if self.task.improving.measured else 1
        return 0 if kind is None else 4 * kinds * cols ** (2 if kind == "gram" else 1)
