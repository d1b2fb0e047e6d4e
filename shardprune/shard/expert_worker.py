"""The worker of `experts`: it sums up what the experts of its layers do, and writes layers that keep some of them. No
Ray here."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from shardprune.model.expert_removal import FewerExperts, fewer_experts_of
from shardprune.model.pruning_job import ExpertRemoval
from shardprune.model.saving import write_tensors_of_layer
from shardprune.shard.expert_tally import ExpertTally
from shardprune.shard.improving_worker import ImprovingWorker
from shardprune.shard.layers import Layers, Version
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.verbs import verb
from shardprune.solvers.statistics import Summed
from shardprune.storage.journal import Journal
from shardprune.storage.records import KeptExperts, LayerRecord


class ExpertWorker(ImprovingWorker):
    """One replica of one shard, whose layers lose experts."""

    spec: WorkerSpec
    layers: Layers

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._tallies: dict[int, list[Tensor]] = {}  # by layer, of one wave after the other
        self._outputs: dict[int, tuple[Tensor, int]] = {}  # by layer, where experts are merged
        self._cut: dict[int, nn.Module] = {}  # the layer in work with the experts that it keeps, where it is trained

    def _open_layers(self) -> Layers:
        """The decoder layers of the shard, those that are finished from their files."""
        spec = self.spec
        fewer = fewer_experts_of(spec.job, self.checkpoint, self.skeleton)
        assert fewer is not None
        assert isinstance(spec.job.removal, ExpertRemoval)
        self.fewer: FewerExperts = fewer
        self._merging = spec.job.removal.merge
        self.journal = Journal(spec.out, spec.fingerprint, self.skeleton.layers, fewer.place, self.checkpoint.entry_at)
        return Layers(
            self.skeleton,
            self.checkpoint,
            self.journal,
            spec.layers,
            set(spec.finished),
            stream=spec.settings.streamed,
            pruned=fewer.reduced,
        )

    # -- statistics ---------------------------------------------------------------------------------------------

    def _observing(self, index: int) -> dict[str, Summed]:
        """No sums over inputs: `_run` looks at experts where there are none of them."""
        return {}

    def _run(
        self,
        index: int,
        version: Version,
        hidden: Tensor,
        sums: dict[str, Summed] | None = None,  # type: ignore[override]
        to_the_end: bool = True,
        all_tokens: bool = False,
    ) -> Tensor:
        """Run one wave through one layer; where it is observed, what its experts do is added up."""
        path = self.fewer.mixture.layers.get(index)
        if sums is None or path is None:
            return super()._run(index, version, hidden)
        layer = self._layer(index, version)
        with ExpertTally(layer.get_submodule(path), self._merging).watching() as tally:
            image = super()._run(index, version, hidden)
        self._tallies.setdefault(index, []).append(tally.sums)
        if tally.outputs is not None:
            known, count = self._outputs.get(index, (torch.zeros_like(tally.outputs), 0))
            self._outputs[index] = known.add_(tally.outputs), count + tally.entered
        return image

    @verb("statistics", layer="index")
    def tally(self, stream: str, wave: int, index: int) -> None:
        """Add up what a dense layer's experts do with one kept wave, which stays as it is."""
        self._run(index, "dense", self.activations.get(stream, wave), {})

    @verb("exchange", layer="index")
    def tallies(self, index: int) -> list[Tensor]:
        """Give up the tallies [6, experts] of the waves that have passed through a layer, in their order."""
        return self._tallies.pop(index)

    @verb("exchange", layer="index")
    def outputs(self, index: int) -> tuple[Tensor, int]:
        """Give up the sums [experts, hidden] of what every expert of a layer gives for every token that has entered the
        mixture, in the order of the waves, and the number of these tokens."""
        return self._outputs.pop(index)

    @verb("solve", layer="index")
    def ratios(self, index: int) -> list[float]:
        """Return mean |w| / rms(w) of the weights of each expert of a layer, read one tensor after the other; 1, the
        largest that there can be, for an expert of zeros alone, which goes first."""
        sums: dict[int, Tensor] = {}
        prefix, path = f"{self.skeleton.family.layers}.{index}.", self.fewer.mixture.layers[index]
        for number in range(self.fewer.mixture.experts):
            found = torch.zeros(3, dtype=torch.float64)
            for part in self.fewer.parts(index):
                weight = self.checkpoint.read(f"{prefix}{path}.{number}.{part}").float()
                found += torch.stack(
                    [
                        torch.tensor(float(weight.numel()), dtype=torch.float64),
                        weight.abs().sum(dtype=torch.float64),
                        weight.square().sum(dtype=torch.float64),
                    ]
                )
            sums[number] = found
        return [
            float(total / count / (squares / count).sqrt()) if squares > 0 else 1.0
            for count, total, squares in sums.values()
        ]

    # -- training what a layer keeps -----------------------------------------------------------------------------

    @verb("read", layer="index")
    def cut(self, index: int, experts: KeptExperts) -> None:
        """Build a layer with the experts that it keeps, to be trained before it is written."""
        prefix = f"{self.skeleton.family.layers}.{index}."

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in self.fewer.shapes(index):
                changed = self.fewer.tensor(index, name, experts)
                yield prefix + name, self.checkpoint.read(prefix + name) if changed is None else changed

        self._cut = {index: self.fewer.reduced.build_layer(index, tensors())}

    def in_work(self, index: int) -> nn.Module:
        """Return the layer that is being changed, as it is now: the cut one, where there is one."""
        return self._cut.get(index) or super().in_work(index)

    # -- writing ------------------------------------------------------------------------------------------------

    @verb("write", layer="index")
    def write(self, index: int, record: LayerRecord) -> int:
        """Write a layer with the experts that its record keeps, tensor by tensor: what was trained as it is now, all
        else from the checkpoint, averaged where experts are merged, else byte by byte; return its bytes."""
        trained = {f"{name}.weight" for step in record.improvements if step.kept for name in step.projections}

        def tensor(name: str) -> Tensor | None:
            if name in trained:
                return self._cut[index].get_parameter(name)
            return self.fewer.tensor(index, name, record.experts, stored=True)

        return write_tensors_of_layer(
            self.journal,
            self.fewer.stored,
            self.skeleton.family,
            index,
            self.fewer.stored_shapes(index),
            tensor,
            record,
        )

    @verb("exchange", layer="index")
    def finish(self, index: int) -> None:
        """Take a layer for finished, whose file is there."""
        self.layers.mark_written(index)
        self._cut.pop(index, None)
        self.held_out.forget()
