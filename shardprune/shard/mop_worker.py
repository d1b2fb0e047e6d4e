"""The worker of `mop`: it keeps the current layers of its shard, builds candidates beside them, and trains what is left
in the end. No Ray here."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardprune.model.saving import write_layer
from shardprune.model.structure.shape import Widths
from shardprune.shard.current_layers import CurrentLayers, Saved, parameters_of
from shardprune.shard.improving_worker import ImprovingWorker
from shardprune.shard.layers import Version
from shardprune.shard.narrowed_layers import NarrowedLayers, skeleton_of_widths
from shardprune.shard.peers import travels
from shardprune.shard.spans import Spans
from shardprune.shard.spec import WorkerSpec
from shardprune.shard.streams import to_device
from shardprune.shard.verbs import of_part, verb
from shardprune.solvers.statistics import Summed
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord

Watched = Literal["nothing", "angles", "inputs"]
REFERENCE = "reference"  # stream of the outputs of the original model's last layer


class MopWorker(ImprovingWorker):
    """One replica of one shard, whose layers may become narrower, be removed, or move to another shard."""

    spec: WorkerSpec
    layers: CurrentLayers

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.narrowed = NarrowedLayers(self, spec.job.scoring, spec.job.measure_error)
        self._angles: dict[int, dict[int, Tensor]] = {}
        self.spans = Spans(self)

    def _open_layers(self) -> CurrentLayers:
        return CurrentLayers(self.skeleton, self.checkpoint)

    # -- the current layers -----------------------------------------------------------------------------------

    @verb("read")
    def read(self, indices: tuple[int, ...], saved: Saved | None) -> None:
        """Keep these layers and no others, read from the checkpoint or from the files of an iteration."""
        if saved is None:
            self.layers.read(indices)
        else:
            journal = Journal(saved.folder, self.spec.fingerprint, len(saved.layers), self.checkpoint.place)
            blanks = skeleton_of_widths(self.skeleton, saved.widths)
            self.layers.read_saved(indices, journal, saved.layers, blanks)
        self.narrowed.give_up()

    @verb("read")
    def read_again(self, indices: tuple[int, ...], saved: Saved) -> None:
        """Replace some of the current layers by those in files."""
        journal = Journal(saved.folder, self.spec.fingerprint, len(saved.layers), self.checkpoint.place)
        self.layers.read_again(indices, journal, saved.layers, skeleton_of_widths(self.skeleton, saved.widths))

    @verb("exchange")
    def adopt(self) -> None:
        """Replace the current layers by the narrowed ones."""
        self.layers.put(self.narrowed.give_up())

    @verb("exchange")
    def discard_narrowed(self) -> None:
        """Free the narrowed layers."""
        self.narrowed.give_up()

    @verb("exchange", layer="index")
    def remove(self, index: int) -> None:
        """Remove a layer."""
        self.layers.pop(index)

    @verb("exchange", layer="index")
    def hand_over(self, index: int) -> dict[str, Tensor]:
        """Give up a layer, for another shard; return its parameters by name."""
        return parameters_of(self.layers.pop(index))

    @verb("exchange", layer="index")
    def take_over(self, index: int, widths: Widths, parameters: dict[str, Tensor]) -> None:
        """Take a layer that another shard has given up."""
        self.layers.put({index: self.narrowed.build(index, widths, parameters)})

    @verb("write", layer="index")
    def write(self, folder: str, layers: int, index: int, record: LayerRecord) -> None:
        """Write a current layer with its record, which has its index in a model of `layers` layers."""
        journal = Journal(folder, self.spec.fingerprint, layers, self.checkpoint.place)
        layer = self.layers.get(index, "dense")
        # Tensors that memory holds exactly are written from there; norms may be stored wider than they compute.
        entries = {name: self.checkpoint.entries[name] for name in self.skeleton.layer_tensors(index)}
        exact = {name for name, entry in entries.items() if self.skeleton.dtype in (entry.dtype, torch.float32)}
        trained = {name for step in record.improvements if step.kept for name in step.projections}
        changed = exact | {self.skeleton.projection_tensor(index, name) for name in trained}
        write_layer(journal, self.checkpoint, self.skeleton, index, layer, changed, record)

    # -- scoring candidates --------------------------------------------------------------------------

    @travels
    @verb("forward")
    def run(self, wave: int, hidden: Tensor, layers: tuple[int, ...], version: Version, watched: Watched) -> Tensor:
        """Run one wave [wave, seqlen, hidden] through some of the shard's layers; return its image.

        Of each layer may be `watched`: its `angles`, the sum over tokens of the cosine between its input and output,
        or its `inputs`, which add to the sums that `narrow` needs.
        """
        hidden = to_device(hidden, self.skeleton.device)
        for index in layers:
            sums = None
            if watched == "inputs":
                sums = self.sums[index] = self.sums.get(index) or self.empty_sums(index)
            before, hidden = hidden, self._run(index, version, hidden, sums)
            if watched == "angles":
                cosines = nn.functional.cosine_similarity(before.float(), hidden.float(), dim=-1)
                self._angles.setdefault(index, {})[wave] = cosines.sum(dtype=torch.float64).cpu()
        return self.leaving(hidden)

    @verb("exchange", layer="index")
    def angles(self, index: int) -> dict[int, float]:
        """Hand out a layer's sums of cosines by wave: the driver adds them up in the order of the waves, whatever the
        number of replicas."""
        return {wave: float(total) for wave, total in self._angles.pop(index, {}).items()}

    @verb("forward")
    def judge(self, wave: int, hidden: Tensor, criterion: str) -> list[float]:
        """Compare the logits of each sequence with those of the original model; return the sums over tokens of their
        cosine similarity, or of the divergence KL(original || this) of the predicted distributions (nats).

        Args:
            hidden: the last layer's output [wave, seqlen, hidden].
            criterion: `cosine` or `kl`.
        """
        self.skeleton.load_frame(self.checkpoint, head=True)
        reference = self.activations.get(REFERENCE, wave)
        sums = []
        for sequence, original in zip(hidden.to(self.skeleton.device), reference, strict=True):
            now, then = (self.skeleton.logits(states.unsqueeze(0))[0].float() for states in (sequence, original))
            if criterion == "cosine":
                values = nn.functional.cosine_similarity(now, then, dim=-1)
            else:
                logs, targets = now.log_softmax(-1), then.log_softmax(-1)
                values = nn.functional.kl_div(logs, targets, reduction="none", log_target=True).sum(-1)
            sums.append(float(values.sum(dtype=torch.float64)))
        return sums

    # -- making layers narrower -------------------------------------------------------------------------------

    narrow = of_part("narrowed", NarrowedLayers.narrow)
    choice = of_part("narrowed", NarrowedLayers.choice)
    install_narrowed = of_part("narrowed", NarrowedLayers.install_narrowed)

    def empty_sums(self, index: int, places: Sequence[int] | None = None) -> dict[str, Summed]:
        """Return what `narrow` needs of a layer's inputs, from nothing."""
        return {**self.narrowed.empty_sums(index)}

    def _layer(self, index: int, version: Version) -> nn.Module:
        if version == "narrowed":
            layer = self.narrowed.get(index)
            assert layer is not None
            return layer
        return super()._layer(index, version)

    # -- training what is left ----------------------------------------------------------------------------------

    depart = of_part("spans", Spans.depart)
    carry = of_part("spans", Spans.carry)
    forget_original = of_part("spans", Spans.forget_original)
    aim = of_part("spans", Spans.aim)  # type: ignore[arg-type]  # of several layers at once

    # -- accounts -----------------------------------------------------------------------------------------------

    def usage(self) -> dict[str, Any]:
        """Return the usage of any worker; `layers` are the first and last of the current ones."""
        held = self.layers.indices
        return super().usage() | {"layers": [held[0], held[-1]] if held else None}
