"""What a worker does to make a layer of its shard narrower.

The verbs in their order: `gather` for every wave, `narrow` on one replica with the others' `sums`, and
`install_narrowed` on the others. The layer as it was stays until the narrowed one takes its place.
"""

from typing import Any

from torch import Tensor, nn

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import Widths, heads_of, reshaped
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.layers import Layers, LayerStore, Version
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.verbs import verb
from shardprune.shard.width_pruning import Choice, Gathered, Narrowing, Part, gathering
from shardprune.storage.journal import Journal


class WidthWorker(ForwardWorker):
    """A worker whose layers may become narrower."""

    spec: WorkerSpec

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.heads = heads_of(self.skeleton.config)
        self._gathered: dict[int, list[Gathered]] = {}
        self._choices: dict[int, Choice] = {}
        self._narrowed: dict[int, nn.Module] = {}  # layers that have not yet taken the place of those they come from
        self._blanks: dict[Widths, Skeleton] = {}  # of the widths in work

    def _open_layers(self) -> LayerStore:
        """The decoder layers of the shard, those that are finished from their files."""
        spec = self.spec
        self.journal = Journal(spec.out, spec.fingerprint, self.skeleton.layers, self.checkpoint.stored_name)
        self.sparse = Checkpoint(spec.sparse, "sparse") if spec.sparse else None
        return Layers(
            self.skeleton,
            self.checkpoint,
            self.journal,
            spec.layers,
            set(spec.finished),
            stream=spec.weights == "streamed",
            given=self.sparse,
            pruned=self._skeleton_of(spec.widths) if spec.widths else None,
        )

    @verb("statistics", layer="index")
    def gather(self, stream: str, wave: int, index: int, passed_on: bool) -> None:
        """Add one kept wave to the sums that narrowing a layer needs; the wave stays as it is, or is `passed_on`:
        replaced by its image under the layer."""
        image = self._run(index, "dense", self.activations.get(stream, wave), self._gathered_of(index))
        if passed_on:
            self.activations.replace(stream, wave, image)

    @verb("exchange", layer="index")
    def sums(self, index: int) -> list[Part]:
        """Hand out the sums of a layer's inputs over this replica's waves."""
        return [gathered.part() for gathered in self._gathered.pop(index)]

    @verb("solve", layer="index")
    def narrow(self, index: int, widths: Widths, *parts: list[Part] | None) -> dict[str, Any]:
        """Make the layer narrower; returns a report of what stays.

        `parts` are the replicas' sums in their order, None in this worker's own place.
        """
        gathered = self._gathered.pop(index)
        if parts:
            for place, own in enumerate(gathered):
                own.merge([part[place] if part else None for part in parts])
        narrowing = self._narrowing(index, widths)
        choice, report = narrowing.choose(gathered)
        self._choices[index] = choice
        self._take(index, widths, {**dict(narrowing.layer.named_parameters()), **narrowing.cut(choice)})
        return report

    @verb("exchange", layer="index")
    def choice(self, index: int) -> Choice:
        """Hand out what was chosen of a layer, for the other replicas."""
        return self._choices[index].cpu()

    @verb("exchange", layer="index")
    def install_narrowed(self, index: int, widths: Widths, choice: Choice) -> None:
        """Make the layer narrower as another replica has chosen."""
        narrowing = self._narrowing(index, widths)
        self._take(index, widths, {**dict(narrowing.layer.named_parameters()), **narrowing.cut(choice)})

    # -- inside -----------------------------------------------------------------------------------------------

    def _run(self, index: int, version: Version, hidden: Tensor, statistics: Any = None) -> Tensor:
        if version == "narrowed":
            return self._through(self._narrowed[index], index, hidden, statistics)
        return super()._run(index, version, hidden, statistics)

    def _skeleton_of(self, widths: Widths) -> Skeleton:
        """Blanks of all layers with other widths."""
        config = reshaped(self.skeleton.config, widths)
        return Skeleton(config, self.skeleton.device, self.skeleton.dtype)

    def _narrowing(self, index: int, widths: Widths) -> Narrowing:
        assert self.spec.scoring is not None
        family, layer = self.skeleton.family, self.layers.get(index, "dense")
        stored = {
            name: self.checkpoint.entries[self.skeleton.projection_tensor(index, name)].dtype for name in family.columns
        }
        return Narrowing(layer, family, self.heads, widths, self.spec.scoring, stored, f"layer {index}")

    def _take(self, index: int, widths: Widths, parameters: dict[str, Tensor]) -> None:
        """Build a narrowed layer from its parameters, in memory of its own."""
        prefix = f"{self.skeleton.family.layers}.{index}."
        tensors = ((prefix + name, parameter.clone()) for name, parameter in parameters.items())
        if widths not in self._blanks:
            self._blanks = {widths: self._skeleton_of(widths)}
        self._narrowed[index] = self._blanks[widths].build_layer(index, tensors)

    def _gathered_of(self, index: int) -> list[Gathered]:
        assert self.spec.scoring is not None
        if index not in self._gathered:
            layer = self.layers.get(index, "dense")
            empty = gathering(layer, self.skeleton.family, self.heads, self.spec.scoring, self.spec.measure_error)
            self._gathered[index] = empty
        return self._gathered[index]
