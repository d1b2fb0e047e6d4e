"""What a worker does to make a layer of its shard narrower.

The verbs in their order: `gather` for every wave, `narrow` on one replica with the others' `sums`, and
`install_narrowed` on the others. The layer as it was stays until the narrowed one takes its place.
"""

from typing import Any

from torch import Tensor, nn

from shardprune.shard.held import parameters_of
from shardprune.shard.layers import Version
from shardprune.shard.narrowing import Gathered, Narrowing, Part, gathering
from shardprune.shard.passing import PassingWorker, timed
from shardprune.shard.spec import WorkerSpec
from shardprune.skeleton import Skeleton, projection_weight
from shardprune.structure.shape import Widths, heads_of


class NarrowingWorker(PassingWorker):
    """A worker whose layers may become narrower."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.heads = heads_of(self.skeleton.config)
        self._gathered: tuple[int, list[Gathered]] | None = None  # of the layer in work
        self._narrowed: dict[int, nn.Module] = {}  # layers that have not yet taken the place of those they come from
        self._blanks: dict[Widths, Skeleton] = {}  # of the widths in work

    @timed
    def gather(self, stream: str, wave: int, index: int) -> None:
        """Add one kept wave to the sums that narrowing a layer needs; the wave stays as it is."""
        self._run(index, "dense", self.activations.get(stream, wave), self._gathered_of(index))

    @timed
    def sums(self, index: int) -> list[Part]:
        """Hand out the sums of a layer's inputs over this replica's waves."""
        parts = [gathered.part() for gathered in self._gathered_of(index)]
        self._gathered = None
        return parts

    @timed
    def narrow(self, index: int, widths: Widths, *parts: list[Part] | None) -> dict[str, Any]:
        """Make the layer narrower; returns a report of what stays.

        `parts` are the replicas' sums in their order, None in this worker's own place.
        """
        assert self.spec.scoring is not None
        gathered, layer = self._gathered_of(index), self.layers.get(index, "dense")
        if parts:
            for place, own in enumerate(gathered):
                own.merge([part[place] if part else None for part in parts])
        output = self.skeleton.projection_tensor(index, next(iter(self.skeleton.family.columns)))
        stored = self.checkpoint.entries[output].dtype
        narrowing = Narrowing(
            layer, self.skeleton.family, self.heads, widths, self.spec.scoring, stored, f"layer {index}"
        )
        changed, report = narrowing.narrow(gathered)
        self._gathered = None
        self._take(index, widths, {**dict(layer.named_parameters()), **changed})
        return report | self._sizes(layer, self._narrowed[index])

    @timed
    def narrowed(self, index: int) -> dict[str, Tensor]:
        """All parameters of a narrowed layer, for the other replicas."""
        return parameters_of(self._narrowed[index])

    @timed
    def install_narrowed(self, index: int, widths: Widths, parameters: dict[str, Tensor]) -> None:
        """Take over a layer that another replica made narrower."""
        self._gathered = None
        self._take(index, widths, {name: parameter.clone() for name, parameter in parameters.items()})

    # -- inside -----------------------------------------------------------------------------------------------

    def _run(self, index: int, version: Version, hidden: Tensor, statistics: Any = None) -> Tensor:
        if version == "narrowed":
            return self._through(self._narrowed[index], index, hidden, statistics)
        return super()._run(index, version, hidden, statistics)

    def _sizes(self, before: nn.Module, after: nn.Module) -> dict[str, int]:
        """The numbers of weights and zeros of a layer's projections before and after."""
        weights = {
            when: [projection_weight(layer, name) for name in self.skeleton.family.projections]
            for when, layer in (("_before", before), ("", after))
        }
        counts = {f"weights{when}": sum(weight.numel() for weight in of) for when, of in weights.items()}
        return counts | {f"zeros{when}": sum(int((weight == 0).sum()) for weight in of) for when, of in weights.items()}

    def _take(self, index: int, widths: Widths, parameters: dict[str, Tensor]) -> None:
        prefix = f"{self.skeleton.family.layers}.{index}."
        tensors = ((prefix + name, parameter) for name, parameter in parameters.items())
        if widths not in self._blanks:
            self._blanks = {widths: self._skeleton_of(widths)}
        self._narrowed[index] = self._blanks[widths].build_layer(index, tensors)

    def _gathered_of(self, index: int) -> list[Gathered]:
        assert self.spec.scoring is not None
        if self._gathered is None:
            layer = self.layers.get(index, "dense")
            empty = gathering(layer, self.skeleton.family, self.heads, self.spec.scoring, self.spec.measure_error)
            self._gathered = index, empty
        assert self._gathered[0] == index, "the layer before this one is not finished"
        return self._gathered[1]
