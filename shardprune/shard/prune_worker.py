"""The worker that owns a shard: what the driver can ask of it, verb by verb. No Ray here.

Pruning a layer takes the verbs in this order: `accumulate` for every wave, `solve` for every input,
`write`, then `propagate` for every wave, which turns the layer's inputs into the next layer's. Where masks
are rebuilt, `compare` for every wave and `rebuild` come before `write`, once for each block.
"""

from typing import Any

from torch import Tensor

from shardprune.model.saving import write_layer
from shardprune.model.skeleton import projection_weight
from shardprune.shard.blocks import Block, Squares
from shardprune.shard.layers import Layers
from shardprune.shard.memory import check_memory
from shardprune.shard.projections import Report, adopt_projection, prune_projection
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.verbs import verb
from shardprune.shard.width_worker import WidthWorker
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.methods import METHODS
from shardprune.solvers.pattern import Pattern, parse_pattern, pattern_of
from shardprune.solvers.statistics import InputStatistics, Kind, Sums, merged, output_error


class PruneWorker(WidthWorker):
    """One replica of one shard."""

    layers: Layers

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.need:
            check_memory(spec.need, spec.device)
        super().__init__(spec)
        self._statistics: tuple[int, list[InputStatistics]] | None = None  # of the layer in work
        self._block: tuple[int, tuple[str, ...], Block] | None = None  # of it that is being rebuilt

    # -- pruning a layer --------------------------------------------------------------------------------------

    @verb("statistics", layer="index")
    def accumulate(self, stream: str, wave: int, index: int) -> None:
        """Add one kept wave to the statistics of the layer's inputs; the wave stays as it is."""
        if self._kind():
            self._run(index, "dense", self.activations.get(stream, wave), self._statistics_of(index))

    @verb("exchange", layer="index")
    def statistics(self, index: int, group: int) -> Sums:
        """The sums of the layer's input `group` over this replica's waves, and their number of sequences."""
        statistics = self._statistics_of(index)[group]
        return statistics.sums.cpu(), statistics.samples

    @verb("solve", layer="index")
    def solve(self, index: int, group: int, shares: dict[str, Share], *parts: Sums | None) -> list[Report]:
        """Prune the projections that read input `group` and put them into the layer.

        `parts` are the replicas' statistics in their order, None in this worker's own place; sums are
        added in that order, so that the result does not depend on who solves.
        """
        layer = self.layers.get(index, "dense")
        statistics = None
        if self._kind():
            statistics = merged(self._statistics_of(index)[group], parts)
        reports = []
        for name in self.skeleton.family.inputs[group]:
            dense = projection_weight(layer, name).float()
            weight, report = self._pruned(index, name, dense, statistics, shares.get(name))
            if statistics and self.spec.measure_error and not self.spec.rebuilding:
                report["error"] = output_error(dense, weight.float(), statistics)
            projection_weight(layer, name).copy_(weight)
            reports.append({"layer": index, "name": name, **report})
        if statistics and self.spec.measure_error and self.spec.rebuilding:  # for `measure`, without the factor
            self._statistics_of(index)[group] = InputStatistics(statistics.kind, statistics.sums, statistics.samples)
        else:
            self._statistics_of(index)[group] = InputStatistics.empty("squares", 1)  # gives the memory back
        return reports

    @verb("exchange", layer="index")
    def solved(self, index: int, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Solved projections, for the other replicas."""
        layer = self.layers.get(index, "dense")
        return {name: projection_weight(layer, name).cpu() for name in names}

    @verb("exchange", layer="index")
    def install(self, index: int, weights: dict[str, Tensor]) -> None:
        """Put projections that another replica solved into the layer."""
        layer = self.layers.get(index, "dense")
        for name, weight in weights.items():
            projection_weight(layer, name).copy_(weight)

    # -- rebuilding the masks of a solved layer, block by block ---------------------------------------------

    @verb("statistics", layer="index")
    def compare(
        self, stream: str, wave: int, index: int, names: tuple[str, ...], gradients: bool
    ) -> tuple[float, float]:
        """Run one kept wave through the block with the projections `names`, dense and sparse; the wave stays.

        Where `gradients` are asked for, their squares add to this replica's sums. Returns
        ||dense - sparse||^2 and ||dense||^2 of the block's outputs.
        """
        hidden = self.activations.get(stream, wave)
        arguments = self.skeleton.layer_arguments(index, 1, hidden.shape[1])
        return self._block_of(index, names).compare(hidden, arguments, gradients)

    @verb("exchange", layer="index")
    def gradients(self, index: int, names: tuple[str, ...]) -> Squares:
        """The squared gradients of a block summed over this replica's sequences, and their number."""
        block = self._block_of(index, names)
        squares, block.squares = block.squares, {}
        return {name: square.cpu() for name, square in squares.items()}, block.samples

    @verb("solve", layer="index")
    def rebuild(
        self, index: int, names: tuple[str, ...], shares: dict[str, Share], *parts: Squares | None
    ) -> tuple[int, dict[str, int]]:
        """Swap weights of a block in the layer; returns how many pairs, and each projection's zeros.

        `parts` are the replicas' squared gradients in their order, None in this worker's own place.
        """
        assert self.spec.rebuilding is not None
        block = self._block_of(index, names)
        own = (block.squares, block.samples)
        patterns = {name: self._pattern(projection_weight(block.layer, name), shares.get(name)) for name in names}
        squares = [part or own for part in parts or (None,)]
        return block.rebuild(self.spec.rebuilding, patterns, squares, f"layer {index}")

    @verb("solve", layer="index")
    def measure(self, index: int, group: int, names: tuple[str, ...]) -> dict[str, float]:
        """The output errors of the projections of a rebuilt block that read input `group`, from the
        statistics that `solve` has left here."""
        block = self._block_of(index, names)
        statistics = self._statistics_of(index)[group]
        return {
            name: output_error(block.dense[name].float(), projection_weight(block.layer, name).float(), statistics)
            for name in self.skeleton.family.inputs[group]
        }

    @verb("solve", layer="index")
    def sizes(self, index: int) -> dict[str, int]:
        """The numbers of weights and zeros of a narrowed layer's projections, and those before."""
        layers = {"_before": self.layers.get(index, "dense"), "": self._narrowed[index]}
        counts = {}
        for when, layer in layers.items():
            weights = [projection_weight(layer, name) for name in self.skeleton.family.projections]
            counts[f"weights{when}"] = sum(weight.numel() for weight in weights)
            counts[f"zeros{when}"] = sum(int((weight == 0).sum()) for weight in weights)
        return counts

    # -- the end of a layer -----------------------------------------------------------------------------------

    @verb("write", layer="index")
    def write(self, index: int, record: dict[str, Any]) -> int:
        """Write the solved layer with a record of what was done: pruned projections in their stored dtype,
        everything else as it was. Returns the bytes of its tensors."""
        projections = {self.skeleton.projection_tensor(index, name) for name in self.skeleton.family.projections}
        narrowed = self._narrowed.get(index)
        layer = narrowed or self.layers.get(index, "dense")
        return write_layer(self.journal, self.checkpoint, self.skeleton, index, layer, projections, record)

    @verb("exchange", layer="index")
    def finish(self, index: int) -> None:
        """The layer is written: from now on it is the pruned one, and its statistics are gone."""
        self.layers.mark_pruned(index, self._narrowed.pop(index, None))
        self._choices.clear()
        self._statistics = None
        self._block = None

    # -- inside -----------------------------------------------------------------------------------------------

    def _pruned(
        self, index: int, name: str, dense: Tensor, statistics: InputStatistics | None, share: Share | None
    ) -> tuple[Tensor, Report]:
        """A projection as the method prunes it, or as the sparse checkpoint has it."""
        stored = self.checkpoint.entries[self.skeleton.projection_tensor(index, name)].dtype
        restore = self.spec.rebuilding is not None and not self.spec.rebuilding.keep_corrected
        label = f"layer {index} {name}"
        if self.sparse is not None:
            given = self.sparse.read(self.skeleton.projection_tensor(index, name)).to(dense)
            return adopt_projection(dense, given, stored, self._pattern(given, share), restore, label)
        assert share is not None
        assert self.spec.method is not None
        pattern = self._pattern(dense, share)
        return prune_projection(METHODS[self.spec.method], dense, stored, statistics, pattern, share, restore, label)

    def _pattern(self, weight: Tensor, share: Share | None) -> Pattern:
        """The pattern of a projection: the recipe's, or what the zeros of a pruned weight show."""
        if self.spec.pattern == "auto":
            return pattern_of(weight)
        return parse_pattern(self.spec.pattern).at(share.sparsity if share else 0.0)

    def _block_of(self, index: int, names: tuple[str, ...]) -> Block:
        """The block with the projections `names` of the layer in work; only one is held at any time."""
        if self._block is None or self._block[:2] != (index, names):
            self._block = None
            dtype, device = self.skeleton.dtype, self.skeleton.device
            tensors = {name: self.checkpoint.read(self.skeleton.projection_tensor(index, name)) for name in names}
            dense = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
            self._block = index, names, Block(self.layers.get(index, "dense"), dense)
        return self._block[2]

    def _kind(self) -> Kind | None:
        """The statistics that this run needs: the error of a projection is known from the whole Gram matrix."""
        if self.spec.measure_error:
            return "gram"
        return METHODS[self.spec.method].needs if self.spec.method else None

    def _statistics_of(self, index: int) -> list[InputStatistics]:
        if self._statistics is None:
            shapes = self.skeleton.projection_shapes(index)
            empty = [
                InputStatistics.empty(self._kind() or "squares", shapes[names[0]][1], self.skeleton.device)
                for names in self.skeleton.family.inputs
            ]
            self._statistics = index, empty
        assert self._statistics[0] == index, "the layer before this one is not finished"
        return self._statistics[1]
