"""The memory of a worker at every step of a run: the tensors that are alive at the same time.

All sizes are bytes. The steps are those of `shardprune.shard`; docs/planning.md has the formulae. A CPU has one memory,
called `device`; a GPU worker also has its process on the `host`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardprune.cluster.object_store import store_bytes
from shardprune.planning.cuts import activity_workspace, workspaces
from shardprune.planning.moments import Moment, Setup, total_bytes
from shardprune.planning.shapes import Input
from shardprune.planning.worker_tensors import WorkerTensors
from shardprune.planning.workload import Model, Task
from shardprune.planning.workspaces import passing_for_gradients, passing_for_routers, solving, state_of_training
from shardprune.shard.error_curves import LOGITS
from shardprune.solvers.error_curves import ROWS
from shardprune.solvers.outliers import BLOCK as OUTLIER_BLOCK
from shardprune.solvers.products import split_bytes
from shardprune.solvers.stack import BLOCK
from shardprune.solvers.training import STEP_TOKENS
from shardprune.solvers.triangles import PANELS, lower_entries


class WorkerMemory(WorkerTensors):
    """The memory of a shard's worker with the most sequences while a layer is in work at which the task is seen."""

    def moments(self) -> Iterator[Moment]:
        """Yield all steps that can be a peak."""
        if self.task.sources:
            yield from self._evaluate()
        if self.model.fewer:
            yield from self._remove_experts(self.model.fewer)
            return
        if self.task.curves:
            yield from self._curves()
        if self._observes():
            yield from self._observe()
        yield from self._prune()

    def peaks(self) -> dict[str, Moment]:
        """Return the moment of largest memory of each phase, host and device together."""
        peaks: dict[str, Moment] = {}
        for moment in self.moments():
            best = peaks.get(moment.phase)
            if best is None or total_bytes(moment) > total_bytes(best):
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
            # Logits and log-probabilities of one sequence in float32.
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
            yield from self._embed("observe", kept, again=bool(task.passes[0]))
        yield self._moment("observe", "forward", self._held() + frame, self._forward(), kept=kept)
        if task.outliers:
            # Column norms in float64; then a block of the metric and two comparisons with thresholds.
            counting = max(8 * self.model.largest, 9 * min(OUTLIER_BLOCK, self.model.largest))
            yield self._moment("observe", "ratios", self._held() + frame, workspace=counting, kept=kept)

    def _remove_experts(self, fewer: Model) -> Iterator[Moment]:
        """Yield the moments of a pass that looks at the experts, whose sums are few, and of copying a layer without
        some of them, one tensor after the other, beside resident layers."""
        task, streamed = self.task, self.setup.streamed
        passed = task.scores == "pass"
        in_turn = (1 + bool(task.improving)) * task.kept_bytes(self.sequences) if task.in_turn else 0
        kept = in_turn if task.behind else task.kept_bytes(self.sequences) if streamed else 0
        resident = 0 if streamed or not (passed or task.sources) else self._held() + self._resident_frame()
        if passed:
            if self.first:
                yield from self._embed("observe", kept, again=bool(task.sources))
            held = self._held() + (0 if streamed else self._resident_frame())
            tokens = min(task.wave, self.sequences) * task.seqlen
            # The tokens as an expert gets them, and what comes of them.
            alone = 2 * tokens * self.model.hidden * task.itemsize if task.merged else 0
            yield self._moment("observe", "forward", held, self._forward() + alone, self._outputs(), kept=kept)
        elif task.scores == "weights":
            # A tensor in float32, its magnitudes, and these in float64 while they are summed up.
            yield self._moment("observe", "ratios", resident, workspace=self.model.largest * (task.stored + 16))
        if task.improving and self.model.shape.experts:
            yield from self._train_cut(fewer, in_turn, again=bool(passed or task.sources))
        # Of an average: two tensors as they are stored, one of them in float64, and the sum.
        copied = int(fewer.largest * (2 * task.stored + 16 if task.merged else fewer.in_files))
        if task.in_turn and streamed:  # layers are there while others are written
            resident = self._held()
        step = "merge" if task.merged else "copy"
        yield self._moment("write", step, resident + copied, kept=in_turn)

    def _train_cut(self, fewer: Model, kept: int, again: bool) -> Iterator[Moment]:
        """Yield the moments of training a layer that has lost experts, beside the dense one: the pass to its aim, and
        each training.

        Args:
            again: resident shards have read all their layers.
        """
        task, weights = self.task, self._held()
        if self.first:
            yield from self._embed("prune", kept, again)
        if not self.setup.streamed:
            # Layers are read as the waves come to them; those before are there as they are cut.
            before = sum(fewer.shapes[index].elements for index in self.layers[:-1]) * task.itemsize
            weights = (weights if again else before + self._layer()) + self._frame(embedding=self.first)
            weights += self._frame(head=self.last and bool(task.sources))
        yield self._moment("prune", "aim", weights, self._forward(), kept=kept)
        cut = WorkerMemory(replace(task, model=fewer), self.setup, self.shard)
        for name in task.trainings:
            yield cut._train(weights + cut._layer(), kept, task.trained(name))

    def _outputs(self) -> int:
        """Return the bytes of the sums of all experts' outputs where these are merged: of all layers of a resident
        shard, or of one; beside them stand those of a wave, twice."""
        if not self.task.merged:
            return 0
        shapes = [self.model.shapes[index] for index in self.layers]
        counts = [shape.experts for shape in shapes]
        return (
            8
            * self.model.hidden
            * ((max(counts) if self.setup.streamed or self.task.behind else sum(counts)) + 2 * max(counts))
        )

    def curve_bytes(self) -> int:
        """Return the bytes of what is kept for error curves: what enters every layer, and the gradients in float32."""
        task = self.task
        sequences = self._curve_sequences()
        return len(self.layers) * task.kept_bytes(sequences) + task.kept_bytes(sequences) * 4 // task.itemsize

    def _curve_sequences(self) -> int:
        return -(-self.task.curve_windows // self.setup.layout.replicas)

    def _curves(self) -> Iterator[Moment]:
        """Yield the moments of measuring error curves: layers keep what enters them; gradients, one wave's at a time,
        go back through them; then each layer has its sums, with which SparseGPT solves some of the rows.
        """
        task, model = self.task, self.model
        kept = self.curve_bytes()
        frame = 0 if self.setup.streamed else self._frame(embedding=self.first, head=self.last)
        weights = self._held() + frame
        if self.first:
            yield from self._embed("curves", kept, again=bool(task.passes[0]))
        yield self._moment("curves", "forward", weights, self._forward(), kept=kept)
        if self.last:
            held = (self._layer() + self._frame(head=True)) if self.setup.streamed else weights
            yield self._reading("curves", "head", held, model.head, self._wave(), kept)
            # Logits and their gradients in both precisions, probabilities in two, whole numbers and their sums.
            drawing = (2 * task.itemsize + 40) * min(LOGITS, task.seqlen * model.vocabulary)
            yield self._moment("curves", "labels", held, drawing + 2 * self._wave(), kept=kept)
        size = min(task.wave, self._curve_sequences())
        yield self._moment("curves", "backward", weights, passing_for_gradients(task, size, self.setup.gpu), kept=kept)
        # Those of all experts at once, and of all tokens that enter their mixtures.
        sums = sum(4 * one.cols**2 for one in model.inputs)
        sums += sum(4 * cols**2 for cols in model.shape.commons(range(len(model.inputs))))
        yield self._moment("curves", "gather", weights, self._forward(), sums, kept=kept)
        for one in {one.size: one for one in reversed(model.inputs)}.values():  # the first of many experts' alike
            square, rows = one.cols**2, sum(one.rows.values()) // ROWS
            exchanged = 4 * lower_entries(one.cols) if self.setup.copies_sums else 0
            split = split_bytes(square // 4 * (PANELS + 1) // PANELS) if self.setup.gpu else 0
            # Beside the factor the rows themselves, columns and masks of the sweep, the change and its image.
            sweep = 4 * square + (4 + 5 + 4 + 4) * one.cols * rows + 20 * BLOCK * rows
            workspace = max(6 * square + split, sweep)
            yield self._moment("curves", f"measure {_label(one)}", weights, 0, sums + exchanged, workspace, kept=kept)

    def _prune(self) -> Iterator[Moment]:
        task = self.task
        improving = task.improving
        kept = (self.segments + bool(improving)) * task.kept_bytes(self.sequences)
        resident = 0 if self.setup.streamed else self._resident_frame()
        if self.first:
            yield from self._embed("prune", kept, again=bool(task.passes[0]) or self._observes())
        weights = self._held() + resident + (0 if self.setup.gpu else self._written())
        if self.model.narrower:
            yield from self._narrow(self.model.narrower, weights, kept)
            return
        if improving.reconstruction:
            yield self._train(weights, kept, self.model.inputs)
        if improving.stream_targets:
            yield from self._aim(weights, kept)
            return
        known = set()  # of many experts' chunks most are alike
        for places in self.model.shape.kind.chunks(self.setup.chunks):
            inputs, commons = [self.model.inputs[place] for place in places], self.model.shape.commons(places)
            alike = tuple(commons), tuple((one.size, task.kind_of(one)) for one in inputs)
            if alike not in known:
                known.add(alike)
                yield from self._solve_chunk(inputs, commons, weights, kept)

    def _solve_chunk(
        self, inputs: Sequence[Input], commons: Sequence[int], weights: int, kept: int
    ) -> Iterator[Moment]:
        """Yield the moments of pruning what reads some of a layer's inputs; `commons` as `LayerShape.commons`."""
        task = self.task
        common = sum(self._sums_of(cols, task.kind) for cols in commons)
        sums = sum(self._sums(one) for one in inputs) + common
        yield self._moment("prune", "accumulate", weights, self._forward(), sums, kept=kept)
        known = set()
        for place, one in enumerate(inputs):
            if one.size in known:  # one of many experts: more has been freed than before its like was solved
                continue
            known.add(one.size)
            left = inputs if self.setup.copies_sums else inputs[place:]
            held = sum(self._sums(other) for other in left)
            exchanged = self._sent(one) if self.setup.copies_sums else 0
            for step, workspace in solving(task, one, self.setup.gpu):
                # Replicas' sums arrive one at a time as a copy, and are added up beside the worker's own.
                copied = exchanged if self.setup.gpu and step == "merge" else 0
                statistics = held + exchanged + (0 if self.setup.gpu or not exchanged else self._mapped(one, inputs))
                yield self._moment(
                    "prune", f"{step} {_label(one)}", weights, 0, statistics, workspace + copied, kept=kept
                )

    def _narrow(self, narrower: Model, weights: int, kept: int) -> Iterator[Moment]:
        """Yield the moments of making a layer narrower: its sums, which stay until the layer is narrow, the steps for
        each output projection, and the narrow layer beside the one that it comes from, which may be trained."""
        task, inputs = self.task, self.model.inputs
        sums = sum(self._sums(one) for one in inputs)
        tokens = min(task.wave, self.sequences) * task.seqlen
        passing = self._forward() + activity_workspace(task, tokens, self.setup.gpu)
        yield self._moment("prune", "accumulate", weights, passing, sums, kept=kept)
        if self.setup.copies_sums:
            # On a CPU all replicas' sums are mapped at the one that takes them; on a GPU one input's are copied.
            sent = [self._sent(one) for one in inputs]
            sums += max(sent) if self.setup.gpu else self.setup.layout.replicas * sum(sent)
        for step, workspace in workspaces(task, self.setup.gpu):
            yield self._moment("prune", step, weights, 0, sums, workspace, kept=kept)
        narrow = WorkerMemory(replace(task, model=narrower), self.setup, self.shard)
        weights += narrow._layer()
        yield self._moment("prune", "pass on", weights, self._forward(), kept=kept)
        if task.improving.reconstruction:
            yield narrow._train(weights, kept, narrower.inputs)

    def _aim(self, weights: int, kept: int) -> Iterator[Moment]:
        """Yield the moments of pruning towards the dense stream, one input after the other. Beside the layer stand its
        dense weights, and those of the input's projections as they were solved first."""
        task, model = self.task, self.model
        tokens = min(task.wave, self.sequences) * task.seqlen
        for one in model.inputs:
            label = _label(one)
            weights_held = weights + (model.projections + one.weights) * task.itemsize
            sums = self._sums(one) + 4 * one.differences
            # The inputs of both passes, output projections' outputs, and differences in float32.
            taps = (
                tokens * (2 * one.cols + 4 * model.hidden) * task.itemsize + 12 * tokens * one.differences // one.cols
            )
            yield self._moment("prune", f"confront {label}", weights_held, self._forward() + taps, sums, kept=kept)
            exchanged = self._sent(one) + 4 * one.differences if self.setup.copies_sums else 0
            aims = 4 * one.weights
            # The factor, and two products beside the weights that are aimed at.
            yield self._moment(
                "prune",
                f"aim {label}",
                weights_held,
                0,
                sums + exchanged,
                4 * one.cols**2 + aims + 8 * one.largest,
                kept,
            )
            for step, workspace in solving(task, one, self.setup.gpu):
                # The factor serves both solutions.
                yield self._moment(
                    "prune", f"{step} {label}", weights_held, 0, sums + exchanged, workspace + aims, kept=kept
                )

    def _train(self, weights: int, kept: int, inputs: Sequence[Input]) -> Moment:
        """Return the moment of training what reads some inputs of a layer: its weights before it, and with targets in
        the dense stream the dense ones; two moments and float32 weights, if it is not computed in these, gradients,
        masks, and what a step's pass keeps for its gradients. The windows of other replicas come on top of a worker's
        own. Where moments and float32 weights are on the host, those of one projection are here, and a gradient in
        float32 and two temporaries of a step in any case.
        """
        task, trained = self.task, sum(one.weights for one in inputs)
        weights += (1 + task.improving.stream_targets) * trained * task.itemsize
        state, largest = state_of_training(task.itemsize), max((one.largest for one in inputs), default=0)
        away = state * trained if self.setup.trains_on_host and self.setup.gpu else 0
        here = state * (largest if away else trained)
        workspace = here + (1 + task.itemsize) * trained + 3 * 4 * largest
        size = min(task.samples - task.held_out, max(1, STEP_TOKENS // task.seqlen))
        lent = 2 * task.kept_bytes(task.samples - self.sequences) if self.setup.layout.replicas > 1 else 0
        step, passing = "train", passing_for_gradients(task, size, self.setup.gpu)
        if all(one in self.model.shape.routers for one in inputs):
            step, passing = "train routers", passing_for_routers(task, size)
        return self._moment("prune", step, weights, passing, workspace=workspace, kept=kept + max(0, lent), away=away)

    def _observes(self) -> bool:
        return self.task.outliers or (len(self.setup.layout.segments) > 1 and self.model.layers > 1)


def peaks_of(task: Task, setup: Setup) -> dict[str, Moment]:
    """Return the moment of largest memory of any worker, by phase."""
    peaks: dict[str, Moment] = {}
    for worker in _representative(task, setup):
        for phase, moment in worker.peaks().items():
            if phase not in peaks or total_bytes(moment) > total_bytes(peaks[phase]):
                peaks[phase] = moment
    return peaks


def largest(task: Task, setup: Setup) -> tuple[Moment, Moment]:
    """Return the moments of largest memory of any worker: on its device, and on its host."""
    moments = [moment for worker in _representative(task, setup) for moment in worker.moments()]
    return max(moments, key=lambda moment: moment.device.peak), max(moments, key=lambda moment: moment.host.peak)


def node_bytes(task: Task, setup: Setup, workers: int) -> int:
    """Return the memory of a node with `workers` workers: their processes and the object store."""
    device, host = largest(task, setup)
    own = host.host.peak if setup.gpu else device.device.peak
    kinds = 2 if task.improving.measured else 1  # with sums over held-out windows
    store = 0
    copied = setup.copies_sums and not task.model.fewer
    lost = setup.copies_sums and bool(task.improving)  # experts: what is trained is sent, and no sums
    for index, _ in task.model.kinds(range(task.model.layers)):
        model = task.model.at(index)
        sent = model.projections * task.itemsize if copied else 0
        if copied and task.improving.stream_targets:
            sent += (setup.layout.replicas - 1) * 4 * max(one.differences for one in model.inputs)
        columns = [one.cols for one in model.inputs if copied] * kinds
        if model.fewer and lost:
            seen = task.at(index)
            trained = [seen.trained(name) for name in task.trainings]
            sent = max(sum(one.weights for one in inputs) for inputs in trained) * task.itemsize
        wave = task.kept_bytes(task.wave) // task.itemsize * (4 if task.curves else task.itemsize)  # of gradients
        store = max(store, store_bytes(setup.layout, wave, columns, sent))
    return workers * own + store


def of_shard(task: Task, setup: Setup, shard: int) -> Iterator[WorkerMemory]:
    """Yield the memory of a shard's worker with the most sequences, at a layer of each kind that it has."""
    for index, _ in task.model.kinds(setup.layout.shards[shard]):
        yield WorkerMemory(task.at(index), setup, shard)


def _representative(task: Task, setup: Setup) -> Iterator[WorkerMemory]:
    """Yield the memory of representative workers: of the first shard, the second, a middle one and the last, and of all
    where layers differ."""
    shards = range(len(setup.layout.shards))
    alike = len(task.model.kinds(range(task.model.layers))) == 1
    for shard in sorted({0, 1, len(shards) // 2, shards[-1]} & set(shards)) if alike else shards:
        yield from of_shard(task, setup, shard)


def _label(one: Input) -> str:
    """Return a short name of an input: its projections'."""
    return "/".join(name.rpartition(".")[2].removesuffix("_proj") for name in one.rows)
