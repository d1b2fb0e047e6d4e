"""The worker of `experts`: it sums up what the experts of its layers do, and writes layers that keep some of them. No
Ray here."""

import torch
from torch import Tensor

from shardprune.model.expert_removal import FewerExperts, fewer_experts_of
from shardprune.model.saving import write_tensors_of_layer
from shardprune.shard.expert_tally import ExpertTally
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.layers import Layers, Version
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.verbs import verb
from shardprune.solvers.statistics import Summed
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord


class ExpertWorker(ForwardWorker):
    """One replica of one shard, whose layers lose experts."""

    spec: WorkerSpec
    layers: Layers

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self._tallies: dict[int, list[Tensor]] = {}  # by layer, of one wave after the other

    def _open_layers(self) -> Layers:
        """The decoder layers of the shard, those that are finished from their files."""
        spec = self.spec
        fewer = fewer_experts_of(spec.job, self.checkpoint, self.skeleton)
        assert fewer is not None
        self.fewer: FewerExperts = fewer
        self.journal = Journal(spec.out, spec.fingerprint, self.skeleton.layers, fewer.place)
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
    ) -> Tensor:
        """Run one wave through one layer; where it is observed, what its experts do is added up."""
        path = self.fewer.mixture.layers.get(index)
        if sums is None or path is None:
            return super()._run(index, version, hidden)
        layer = self._layer(index, version)
        with ExpertTally(layer.get_submodule(path)).watching() as tally:
            image = super()._run(index, version, hidden)
        self._tallies.setdefault(index, []).append(tally.sums)
        return image

    @verb("exchange", layer="index")
    def tallies(self, index: int) -> list[Tensor]:
        """Give up the tallies [6, experts] of the waves that have passed through a layer, in their order."""
        return self._tallies.pop(index)

    @verb("solve", layer="index")
    def ratios(self, index: int) -> list[float]:
        """Return mean |w| / rms(w) of the weights of each expert of a layer, read one tensor after the other."""
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
            float(total / count / (squares / count).sqrt()) if squares > 0 else 0.0
            for count, total, squares in sums.values()
        ]

    # -- writing ------------------------------------------------------------------------------------------------

    @verb("write", layer="index")
    def write(self, index: int, record: LayerRecord) -> int:
        """Write a layer with the experts that its record keeps, tensor by tensor from the checkpoint, byte by byte;
        return its bytes."""
        kept = record.experts.kept if record.experts else ()
        return write_tensors_of_layer(
            self.journal,
            self.checkpoint,
            self.skeleton.family,
            index,
            self.fewer.shapes(index),
            lambda name: self.fewer.tensor(index, name, kept),
            record,
        )

    @verb("exchange", layer="index")
    def finish(self, index: int) -> None:
        """Take a layer for finished, whose file is there."""
        self.layers.mark_written(index)
