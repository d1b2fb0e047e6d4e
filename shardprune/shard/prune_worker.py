"""The worker that prunes the layers of its shard: the verbs that a driver calls. No Ray here.

Pruning a layer takes the verbs in this order: `accumulate` for every wave, `solve` for every input, both again for each
chunk of its experts where their sums are too many to be there together, `write` and `finish`, then `propagate` for
every wave, which turns the layer's inputs into the next layer's. The file is written meanwhile; `written` waits for it
before the next layer's `write`. Where projections aim at the dense stream, `confront` for every wave, `solve` and
`correct` come one input after the other instead; where masks are rebuilt, `compare` for every wave and `rebuild` come
before `write`, once for each block; where structures are removed, `narrow` stands in the place of `solve`.
`reconstruct` trains a layer at the end. Before all, `shardprune.shard.error_curves` may measure what layers lose. Steps
that improve it are judged by `aim`, `miss`, `remember` and `put_back`.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from shardprune.model.checkpoint import reopened
from shardprune.model.experts import DOWN
from shardprune.model.pruning_job import Adopted, Zeroing
from shardprune.model.saving import changed_tensors, shapes_of, write_tensors_of_layer
from shardprune.model.skeleton import projection_weight
from shardprune.shard.blocks import Block, SquaredGradients
from shardprune.shard.dense_weights import DenseWeights
from shardprune.shard.error_curves import ErrorCurves
from shardprune.shard.improving_worker import ImprovingWorker
from shardprune.shard.layers import Layers
from shardprune.shard.memory import check_memory
from shardprune.shard.narrowed_layers import NarrowedLayers, skeleton_of_widths
from shardprune.shard.projections import adopt_projection, prune_projections
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.stream_targets import StreamTargets
from shardprune.shard.verbs import of_part, verb
from shardprune.shard.write_behind import WriteBehind
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import METHODS
from shardprune.solvers.pattern import Pattern, parse_pattern, pattern_of
from shardprune.solvers.statistics import InputStatistics, Kind, Summed, output_error
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord, LayerSizes, ProjectionReport


class PruneWorker(ImprovingWorker):
    """One replica of one shard whose layers are pruned."""

    spec: WorkerSpec
    layers: Layers

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.need:
            check_memory(spec.need, spec.settings.device)
        super().__init__(spec)
        zeroing = spec.job.zeroing
        self.all_tokens = isinstance(zeroing, Zeroing) and zeroing.all_tokens
        self.narrowed = NarrowedLayers(self, spec.job.scoring, spec.job.measure_error)
        self.dense = DenseWeights(self)
        self.stream_targets = StreamTargets(self, self.dense, spec.job)
        self.error_curves = ErrorCurves(self)
        self._block: tuple[int, str, Block] | None = None  # that is being rebuilt
        self._files = WriteBehind(self.skeleton.device)

    def _open_layers(self) -> Layers:
        """The decoder layers of the shard, those that are finished from their files."""
        spec = self.spec
        self.journal = Journal(spec.out, spec.fingerprint, self.skeleton.layers, self.checkpoint.place)
        self.sparse = reopened(spec.job.sparse, spec.sparse, "sparse") if spec.job.sparse else None
        return Layers(
            self.skeleton,
            self.checkpoint,
            self.journal,
            spec.layers,
            set(spec.finished),
            stream=spec.settings.streamed,
            given=self.sparse,
            pruned=skeleton_of_widths(self.skeleton, spec.widths) if spec.widths else None,
        )

    # -- before layers are pruned -------------------------------------------------------------------------------

    draw_labels = of_part("error_curves", ErrorCurves.draw_labels)
    backward = of_part("error_curves", ErrorCurves.backward)
    differentiate = of_part("error_curves", ErrorCurves.differentiate)
    begin_curves = of_part("error_curves", ErrorCurves.begin_curves)
    gather = of_part("error_curves", ErrorCurves.gather)
    gathered = of_part("error_curves", ErrorCurves.gathered)
    measure_curves = of_part("error_curves", ErrorCurves.measure_curves)

    # -- zeroing weights --------------------------------------------------------------------------------------

    @verb("solve", layer="index")
    def solve(self, index: int, group: int, shares: dict[str, Share]) -> list[ProjectionReport]:
        """Prune the projections that read input `group`, by the sums of all replicas, and put them into the layer."""
        layer, names = self.layers.get(index, "dense"), self.skeleton.family.kinds[index].inputs[group]
        weights = {name: projection_weight(layer, name) for name in names}
        tensors = {name: self.skeleton.projection_tensor(index, name) for name in names}
        stored = self.stored_dtypes(index, names)
        statistics = self._input(index, group)
        zeroing, rebuilding = self.spec.job.zeroing, self.spec.job.rebuilding
        restore = rebuilding is not None and not rebuilding.keep_corrected
        if self.sparse is not None:
            reports = []
            for name, weight in weights.items():
                dense = weight.float()
                given = self.sparse.read(tensors[name]).to(dense)
                pattern = self._pattern(given, None)
                adopted, report = adopt_projection(dense, given, stored[name], pattern, restore, index, name)
                weight.copy_(adopted)
                reports.append(report)
        else:
            assert isinstance(zeroing, Zeroing)
            measured = self.spec.job.measure_error and not rebuilding  # else by `measure`, after rebuilding
            towards_stream = self.spec.job.improving.stream_targets
            damping, tokens = zeroing.damping, None
            if statistics and (tokens := statistics.tokens_in_all) is not None and names[0].endswith(f".{DOWN}"):
                damping = statistics.least_damping(damping) if damping != "auto" else damping
            method = METHODS[zeroing.method]
            reports = prune_projections(
                method,
                weights,
                stored,
                statistics,
                zeroing.pattern,
                shares,
                restore,
                measured,
                index,
                zeroing.refit and not towards_stream,  # else `correct` fits, and both are judged as one step
                damping,
            )
            if tokens is not None:
                reports = [replace(report, tokens=tokens) for report in reports]
        if statistics and not self.spec.job.improving.stream_targets:  # which `correct` takes as well
            # As large as a layer: given back, or kept without the factor for `measure`.
            del self.sums[index][names[0]]
            if self.spec.job.measure_error and rebuilding:
                self.sums[index][names[0]] = replace(statistics, _factors={})
            if not self.sums[index]:  # the next chunk of inputs begins with nothing
                del self.sums[index]
        return reports

    @verb("statistics", layer="index")
    def hold_out(self, stream: str, wave: int, index: int, places: tuple[int, ...] | None = None) -> None:
        """Add one kept wave, which is held out, to the sums over a dense layer's inputs that judge solutions."""
        if index not in self.sums:
            self.sums[index] = self.empty_sums(index, places)
        held_out = {}
        for name, statistics in self.sums[index].items():
            assert isinstance(statistics, InputStatistics)
            assert statistics.held_out is not None
            held_out[name] = statistics.held_out
        self.add_inputs(index, self.activations.get(stream, wave), held_out, self.all_tokens)

    # -- aiming at the dense stream ------------------------------------------------------------------------------

    keep_dense = of_part("stream_targets", StreamTargets.keep_dense)
    confront = of_part("stream_targets", StreamTargets.confront)
    correct = of_part("stream_targets", StreamTargets.correct)

    # -- rebuilding the masks of a solved layer, block by block ---------------------------------------------

    @verb("statistics", layer="index")
    def compare(self, stream: str, wave: int, index: int, block: str, gradients: bool) -> tuple[float, float]:
        """Run one kept wave through a block, dense and sparse; the wave stays.

        Where `gradients` are asked for, their squares add to this replica's sums. Returns
        ||dense - sparse||^2 and ||dense||^2 of the block's outputs.
        """
        hidden = self.activations.get(stream, wave)
        arguments = self.skeleton.layer_arguments(index, 1, hidden.shape[1])
        compared = self._block_of(index, block)
        squares: SquaredGradients | None = None
        if gradients:
            known = self.sums.setdefault(index, {}).setdefault(block, SquaredGradients(compared.dense))
            assert isinstance(known, SquaredGradients)
            squares = known
        return compared.compare(hidden, arguments, squares)

    @verb("solve", layer="index")
    def rebuild(self, index: int, block: str, shares: dict[str, Share]) -> tuple[int, dict[str, int]]:
        """Swap weights of a block in the layer, by the squared gradients of all replicas; return how many pairs, and
        each projection's zeros."""
        rebuilding = self.spec.job.rebuilding
        assert rebuilding is not None
        rebuilt = self._block_of(index, block)
        patterns = {
            name: self._pattern(projection_weight(rebuilt.layer, name), shares.get(name)) for name in rebuilt.dense
        }
        squares = self.sums.get(index, {}).pop(block, None)
        assert squares is None or isinstance(squares, SquaredGradients)
        return rebuilt.rebuild(rebuilding, patterns, squares, f"layer {index}")

    @verb("solve", layer="index")
    def measure(self, index: int, group: int, block: str) -> dict[str, float]:
        """Return the output errors of the projections of a rebuilt block that read input `group`, from the statistics
        that `solve` has left here."""
        rebuilt, statistics = self._block_of(index, block), self._input(index, group)
        assert statistics is not None
        return {
            name: output_error(rebuilt.dense[name].float(), projection_weight(rebuilt.layer, name).float(), statistics)
            for name in self.skeleton.family.kinds[index].inputs[group]
            if name in rebuilt.dense
        }

    # -- removing structures ----------------------------------------------------------------------------------

    narrow = of_part("narrowed", NarrowedLayers.narrow)
    choice = of_part("narrowed", NarrowedLayers.choice)
    install_narrowed = of_part("narrowed", NarrowedLayers.install_narrowed)

    @verb("solve", layer="index")
    def sizes(self, index: int) -> LayerSizes:
        """Count the weights and zeros of a narrowed layer's projections, and those before."""
        narrowed, names = self.narrowed.get(index), self.skeleton.family.kinds[index].projections
        assert narrowed is not None
        before, after = (
            [projection_weight(layer, name) for name in names] for layer in (self.layers.get(index, "dense"), narrowed)
        )
        return LayerSizes(
            weights_before=sum(weight.numel() for weight in before),
            zeros_before=sum(int((weight == 0).sum()) for weight in before),
            weights=sum(weight.numel() for weight in after),
            zeros=sum(int((weight == 0).sum()) for weight in after),
        )

    # -- the end of a layer -----------------------------------------------------------------------------------

    @verb("write", layer="index")
    def write(self, index: int, record: LayerRecord) -> None:
        """Begin to write the pruned layer with its record: projections in their stored dtype, everything else as it
        was. It may not change from now on; `written` waits for its file."""
        family = self.skeleton.family
        projections = {self.skeleton.projection_tensor(index, name) for name in family.kinds[index].projections}
        layer = self.narrowed.get(index) or self.layers.get(index, "dense")
        shapes, tensors = shapes_of(layer), changed_tensors(self.checkpoint, family, index, layer, projections)
        self._files.begin(
            index,
            tensors,
            lambda tensor: write_tensors_of_layer(self.journal, self.checkpoint, family, index, shapes, tensor, record),
        )

    @verb("write", layer="index")
    def written(self, index: int) -> int:
        """Wait until the layer's file is there; return the bytes of its tensors."""
        return self._files.wait(index)

    @verb("exchange", layer="index")
    def finish(self, index: int) -> None:
        """Nothing is left to be done to the layer: from now on it is the pruned one, and its statistics are gone. Its
        file may not be there yet."""
        self.layers.mark_pruned(index, self.narrowed.give_up().get(index))
        self.sums.pop(index, None)
        self._block = None
        self.dense.drop()
        self.held_out.forget()

    def digests(self) -> dict[str, dict[str, str]]:
        """Return the digests of what was read since the last call."""
        return super().digests() | ({"sparse": self.sparse.source.hand_out()} if self.sparse else {})

    def close(self) -> None:
        """End the threads of this worker. A file under way has some seconds to be finished."""
        self._files.close()

    # -- inside -----------------------------------------------------------------------------------------------

    def in_work(self, index: int) -> nn.Module:
        """Return the layer that is being changed, as it is now: the narrowed one, where there is one."""
        return self.narrowed.get(index) or super().in_work(index)

    def _pattern(self, weight: Tensor, share: Share | None) -> Pattern:
        """The pattern of a projection: the recipe's, or what the zeros of a pruned weight show."""
        zeroing = self.spec.job.zeroing
        if isinstance(zeroing, Zeroing) and share:
            return zeroing.pattern.at(share.sparsity)
        assert isinstance(zeroing, Adopted)
        return pattern_of(weight) if zeroing.pattern == "auto" else parse_pattern(zeroing.pattern).at(0.0)

    def _block_of(self, index: int, name: str) -> Block:
        """A block of the layer in work; only one is held at any time."""
        if self._block is None or self._block[:2] != (index, name):
            self._block = None
            dtype, device = self.skeleton.dtype, self.skeleton.device
            kind = self.skeleton.family.kinds[index]
            names = kind.blocks[name]
            tensors = {name: self.checkpoint.read(self.skeleton.projection_tensor(index, name)) for name in names}
            dense = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
            self._block = index, name, Block(self.layers.get(index, "dense"), dense, kind.end_of(name))
        return self._block[2]

    def _input(self, index: int, group: int) -> InputStatistics | None:
        """The sums over one input of the layer in work; None where this run needs none."""
        statistics = self._known(index).get(self._kind(index).input_names[group])
        assert statistics is None or isinstance(statistics, InputStatistics)
        return statistics

    def empty_sums(self, index: int, places: Sequence[int] | None = None) -> dict[str, Summed]:
        """Return what this run sums up over a layer's inputs, all or those at some `places`, from nothing."""
        assert not self.sums, "the layer before this one is not finished"
        job = self.spec.job
        if job.scoring:
            return {**self.narrowed.empty_sums(index)}
        kind: Kind | None = job.zeroing.needs if isinstance(job.zeroing, Zeroing) else None
        if job.measure_error:  # which takes the whole Gram matrix
            kind = "gram"
        found = self.empty_statistics(index, kind, places) if kind else {}
        if job.improving.measured:
            for name, others in self.empty_statistics(index, "gram", places).items():
                found[name].held_out = others
        return {**found}
