"""State that passes from layer to layer beside the hidden states of a model, and the columns of a wave that carry it.

Most models pass one tensor of hidden states on. Some have several streams of them (Gemma 3n), give each layer an input
of its own that depends on the tokens (Gemma 3n, Gemma 4 E), let later layers use the keys and values of an earlier one
(the same), or the places that an earlier layer has chosen to attend to (GLM-5), or look at the tokens themselves
(DeepSeek-V4). A wave is one tensor [batch, seqlen, columns] nevertheless, so that it is kept, sent and resumed as any
other: what a layer needs is cut out of its columns, and what the layer gives goes back into them. Values keep their
bits, and tensors the memory layout that they have in the whole model, so that products round alike.
"""

import inspect
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Parameters of a layer's forward pass: its own input, keys and values of earlier layers, indices of places, tokens.
OWN, SHARED, CHOSEN, TOKENS = "per_layer_input", "shared_kv_states", "prev_topk_indices", "input_ids"
WORD = torch.int32  # of an index or a token


def parameters_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of a layer's forward pass, the hidden states first."""
    return tuple(inspect.signature(type(layer).forward).parameters)[1:]


@dataclass(frozen=True)
class Carried:
    """The columns of a wave, in this order: hidden states, each layer's own input, shared keys and values, indices, and
    the token.

    Attributes:
        hidden: columns of the hidden states of one stream.
        streams: of hidden states, where layers take [streams, batch, seqlen, hidden], or [batch, seqlen, streams,
            hidden] if the streams lie `within` the tokens; 0 where there is but one.
        own: columns of a layer's own input; 0 where there are none.
        layers: of the model.
        shared: heads and their width of keys and values that layers share, by their name.
        chosen: the most tokens that are chosen for a token; 0 where none are passed on.
        tokens: layers look at the tokens.
        names: of the parameters of a layer's forward pass.
    """

    hidden: int
    streams: int = 0
    within: bool = False
    own: int = 0
    layers: int = 0
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    chosen: int = 0
    tokens: bool = False
    names: tuple[str, ...] = ()

    @property
    def stateless(self) -> bool:
        """Whether a wave is the hidden states alone."""
        return not (self.streams or self.own or self.shared or self.chosen or self.tokens)

    @property
    def states(self) -> int:
        """The columns of all streams of hidden states."""
        return self.hidden * max(self.streams, 1)

    @property
    def _fixed(self) -> int:
        return self.states + self.own * self.layers + sum(2 * heads * width for heads, width in self.shared.values())

    def columns(self, seqlen: int, itemsize: int) -> int:
        """Return the columns of a wave of sequences of `seqlen` tokens, whose elements have `itemsize` bytes."""
        return self._fixed + (min(self.chosen, seqlen) + self.tokens) * WORD.itemsize // itemsize

    # -- into a wave ----------------------------------------------------------------------------------------

    def wave(self, hidden: Tensor, own: Iterable[Tensor], tokens: Tensor) -> Tensor:
        """Return the wave [batch, seqlen, columns] that enters the first layer.

        Args:
            hidden: [batch, seqlen, hidden], with one more dimension for streams.
            own: the input of each layer, [batch, seqlen, own].
            tokens: [batch, seqlen].
        """
        if self.stateless:
            return hidden
        parts = [self._states(hidden), *own]
        batch, seqlen = parts[0].shape[:2]
        last = [tokens.to(WORD).unsqueeze(-1).view(hidden.dtype)] if self.tokens else []
        columns = self.columns(seqlen, hidden.element_size()) - sum(part.shape[-1] for part in (*parts, *last))
        return torch.cat([*parts, hidden.new_zeros(batch, seqlen, columns), *last], dim=-1)

    def hidden_states(self, wave: Tensor) -> Tensor:
        """Return the hidden states of a wave as the model's layers return them."""
        if self.stateless:
            return wave
        states = wave[..., : self.states]
        if not self.streams:
            return states.contiguous()
        apart = states.unflatten(-1, (self.streams, self.hidden))
        return (apart if self.within else apart.permute(2, 0, 1, 3)).contiguous()

    def _states(self, hidden: Tensor) -> Tensor:
        if not self.streams:
            return hidden
        return (hidden if self.within else hidden.permute(1, 2, 0, 3)).flatten(2)

    def _token(self, wave: Tensor) -> Tensor:
        """The columns of a wave that are the token."""
        return wave[..., wave.shape[-1] - self.tokens * WORD.itemsize // wave.element_size() :]

    # -- a layer's call ---------------------------------------------------------------------------------------

    def entering(self, wave: Tensor, index: int, keywords: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of layer `index` that a wave carries, in the place of those that a model without tokens
        has passed to it."""
        keywords = dict(keywords)
        place = self.states
        if self.own:
            start = place + index * self.own
            keywords[OWN] = wave[..., start : start + self.own]
        place += self.own * self.layers
        if self.shared:
            held: UserDict[str, tuple[Tensor, Tensor]] = UserDict()  # as transformers has it, lest FSDP looks into it
            for name, (heads, width) in self.shared.items():
                both = wave[..., place : place + 2 * heads * width].unflatten(-1, (2, heads, width))
                place += 2 * heads * width
                held[name] = tuple(both[:, :, one].contiguous().transpose(1, 2) for one in (0, 1))
            keywords[SHARED] = held
        if self.chosen:
            end = wave.shape[-1] - self._token(wave).shape[-1]
            keywords[CHOSEN] = wave[..., place:end].detach().contiguous().view(WORD).long()
        if self.tokens:
            keywords[TOKENS] = self._token(wave).detach().contiguous().view(WORD).squeeze(-1).long()
        return keywords

    def leaving(self, wave: Tensor, output: Any, keywords: Mapping[str, Any]) -> Tensor:
        """Return the image of a wave under a layer that was called with some arguments and gave an output."""
        hidden = output[0] if isinstance(output, tuple) else output
        end = self.states + self.own * self.layers
        parts = [self._states(hidden), wave[..., self.states : end]]
        for name in self.shared:
            parts += [one.transpose(1, 2).flatten(2) for one in keywords[SHARED][name]]
        if self.chosen:
            parts.append(output[1].to(WORD).contiguous().view(hidden.dtype))
        if self.tokens:
            parts.append(self._token(wave))
        return torch.cat(parts, dim=-1)


def frame_inputs(model: PreTrainedModel, blank: Tensor) -> dict[str, Tensor]:
    """Return what a model needs beside the embedding `blank` [batch, seqlen, hidden] of no tokens."""
    config = model.config.get_text_config()
    if not (own := getattr(config, "hidden_size_per_layer_input", 0)):
        return {}
    return {"per_layer_inputs": blank.new_zeros(*blank.shape[:2], config.num_hidden_layers, own)}


def further_embedding(model: PreTrainedModel) -> Tensor | None:
    """Return the weight of a model's embedding of its layers' own inputs; None where it has none."""
    table = getattr(model.get_decoder(), "embed_tokens_per_layer", None)
    return None if table is None else table.weight
