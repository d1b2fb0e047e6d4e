"""The worker that writes text: sequences grow token by token, and what is kept of them stays where the layers are."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardprune.errors import SolverError
from shardprune.model.draft import Kept, kept_by
from shardprune.model.kept_keys import KeptKeys
from shardprune.shard.cuda import without_cudnn_attention
from shardprune.shard.device_room import device_room
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.layers import Layers, LayerStore
from shardprune.shard.memory import memory_of
from shardprune.shard.peers import travels
from shardprune.shard.spec import GenerationSpec
from shardprune.shard.verbs import verb
from shardprune.shard.waves import Wave
from shardprune.solvers.sampling import drawn_tokens

HELD_LAYERS = 2  # of a streaming worker: the current one and the next
SAMPLING_BYTES = 32  # for each logit of a batch: probabilities in two precisions, whole numbers and their sums


@dataclass(frozen=True)
class Room:
    """What a worker has room for: whole `batches` with their keys, values and states, beside the shard's layers where
    these are `resident`. One batch takes `batch_bytes` of its `bytes`."""

    resident: bool
    batches: int
    batch_bytes: int
    bytes: int


class GenerationWorker(ForwardWorker):
    """One replica of one shard of a model that writes text."""

    spec: GenerationSpec

    def _open_layers(self) -> LayerStore:
        self._kept: dict[int, list[KeptKeys]] = {}  # by wave, for each of its batches
        self._draws: dict[int, Tensor] = {}  # by wave, of the last shard
        self._resident = not self.spec.settings.streamed or self._room(resident=True).batches > 0
        return Layers(self.skeleton, self.checkpoint, None, self.spec.layers, set(), stream=not self._resident)

    @verb("exchange")
    def room(self) -> Room:
        """Return what this worker has room for."""
        return self._room(self._resident)

    # -- one token further ------------------------------------------------------------------------------------

    @travels
    @verb("forward")
    def extend(self, wave: Wave, position: int, incoming: Tensor) -> Tensor:
        """Run the tokens of a wave at a position through the shard's layers; return their hidden states
        [sequences, 1, hidden], for the next shard.

        Args:
            incoming: the tokens [sequences, 1] on the first shard, else their hidden states.
        """
        return self.leaving(torch.cat(self._through(wave, position, incoming)))

    @verb("forward")
    def draw(self, wave: Wave, position: int, incoming: Tensor) -> Tensor:
        """Run the tokens of a wave at a position through the last shard's layers, as `extend` does; return the tokens
        [sequences, 1] of the next position.

        Raises:
            SolverError: the logits are not finite.
        """
        draft = self.spec.draft
        if wave.index not in self._draws:
            self._draws[wave.index] = draft.draws(range(wave.start, wave.stop))
        uniform = self._draws[wave.index][:, position + 1]
        self.skeleton.load_frame(self.checkpoint, head=True)
        tokens = []
        parts = self._through(wave, position, incoming)
        for hidden, own in zip(parts, uniform.split(draft.batch), strict=True):
            logits = self.skeleton.logits(hidden)[:, -1]
            if not bool(torch.isfinite(logits).all()):
                raise SolverError(f"token {position + 1} of a text: the model's logits are not finite")
            tokens.append(drawn_tokens(logits, draft.temperature, own))
        return torch.cat(tokens).unsqueeze(1)

    @verb("exchange")
    def forget(self, wave: Wave) -> None:
        """Free what is kept of a wave."""
        self._kept.pop(wave.index, None)
        self._draws.pop(wave.index, None)

    # -- inside -----------------------------------------------------------------------------------------------

    def _through(self, wave: Wave, position: int, incoming: Tensor) -> tuple[Tensor, ...]:
        """Run the tokens of a wave at a position through the shard's layers; return the hidden states
        [sequences, 1, hidden] of every batch.

        A layer has all batches before the next one is needed, which a streaming worker reads only once then.
        """
        parts = incoming.to(self.skeleton.device).split(self.spec.draft.batch)
        if wave.index not in self._kept:
            skeleton, length = self.skeleton, self.spec.draft.length
            self._kept[wave.index] = [KeptKeys(skeleton.layers, length, skeleton.attentions) for _ in parts]
        kept = self._kept[wave.index]
        for own in kept:
            own.seen = position
        if self.spec.layers[0] == 0:
            self.skeleton.load_frame(self.checkpoint, embedding=True)
            parts = tuple(self.skeleton.embed(tokens, own) for tokens, own in zip(parts, kept, strict=True))
        arguments = [self.skeleton.next_arguments(len(part), own) for part, own in zip(parts, kept, strict=True)]
        for index in self.spec.layers:
            layer = self.layers.get(index, "dense")
            with without_cudnn_attention():  # the keys are one longer each time
                parts = tuple(
                    self.skeleton.forward_layer(layer, part, own[index])
                    for part, own in zip(parts, arguments, strict=True)
                )
        return parts

    def _room(self, resident: bool) -> Room:
        """Return what this worker has room for if its layers stay in memory, or if they do not."""
        spec, skeleton, draft = self.spec, self.skeleton, self.spec.draft
        memory = memory_of(skeleton.device)
        there = device_room(memory) if skeleton.device.type == "cuda" else memory // spec.workers
        sizes = [sum(math.prod(shape) for shape in skeleton.layer_tensors(index).values()) for index in spec.layers]
        held = sum(sizes) if resident else HELD_LAYERS * max(sizes)
        embedding, head = skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings()
        frame = {
            id(module.weight): module.weight.numel()
            for module, here in ((embedding, spec.layers[0] == 0), (head, spec.layers[-1] == skeleton.layers - 1))
            if here
        }
        held = (held + sum(frame.values())) * skeleton.dtype.itemsize
        batch = min(draft.batch, draft.sequences)
        held += SAMPLING_BYTES * batch * skeleton.config.vocab_size if id(head.weight) in frame else 0
        kept = sum(kept_by(skeleton, spec.layers), Kept())
        batch_bytes = max(1, batch * kept.bytes_of(draft.length, skeleton.dtype))  # of MLPs alone, nothing
        return Room(resident, max(0, there - held) // batch_bytes, batch_bytes, there)
