"""What a shard keeps of the tokens that it has seen for those that follow: keys and values, and states of layers that
have such (convolutions, linear attention, state spaces)."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

ARGUMENT, ARGUMENT_OF_STATES = "past_key_values", "cache_params"  # the latter of models without any attention
POSITIONS = "position_ids"


def kept_argument(model: nn.Module) -> str:
    """Return the name of the argument of a model that is what is kept of earlier tokens; its output has the same."""
    return ARGUMENT_OF_STATES if ARGUMENT_OF_STATES in _parameters(type(model).forward) else ARGUMENT


def going_on(model: nn.Module, kept: Any, seen: int, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a model for one token after `seen` others of which it has what is `kept`.

    As where transformers generates, the model is told the position: some (Bamba) do not look it up in what is kept.
    """
    takes = POSITIONS in _parameters(type(model).forward)
    position = {POSITIONS: torch.full((1, 1), seen, device=device)} if takes else {}
    return {kept_argument(model): kept, "use_cache": True, **position}


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


class KeptKeys(Cache):
    """Keys, values and states of sequences that grow together, for all layers of a model of which some are here.

    Memory for `length` tokens is taken when a layer sees the first one, so that nothing moves as sequences grow. Layers
    with sliding windows keep all tokens, too: their masks leave out what is too far.

    `seen` is the number of tokens that have passed, which the owner counts: it holds for layers that are elsewhere, and
    while a token is on its way through the layers.

    Args:
        attentions: of each layer, which keep keys and values of their own.
    """

    def __init__(self, layers: int, length: int, attentions: int = 1) -> None:
        self.seen, self.length, self._attentions = 0, length, attentions
        super().__init__(layers=[_KeptLayer(self) for _ in range(layers * attentions)])

    def elements(self, layer: int) -> int:
        """Return the number of elements of one layer's keys and values."""
        return sum(kept.numel() for own in self._of(layer) for kept in (own.keys, own.values) if kept is not None)

    def state_bytes(self, layer: int) -> int:
        """Return the bytes of one layer's states, which do not grow with the sequences."""
        states = [
            state for own in self._of(layer) for state in (*own.conv_states.values(), *own.recurrent_states.values())
        ]
        return sum(state.nbytes for state in states if state is not None)

    def _of(self, layer: int) -> "list[_KeptLayer]":
        """Return what the attentions of one layer keep."""
        first = layer * self._attentions
        return cast("list[_KeptLayer]", self.layers[first : first + self._attentions])


class _KeptLayer(LinearAttentionLayer, CacheLayerMixin):
    """One layer's keys and values, [sequences, key heads, length, width] each, and its states, as transformers keeps
    them."""

    is_sliding = False
    is_compileable = False  # else masks are made where attention needs none

    def __init__(self, of: KeptKeys) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self._of = of

    def _take_room(self, key_states: Tensor, value_states: Tensor) -> None:
        room = [
            torch.empty(*states.shape[:2], self._of.length, states.shape[-1], dtype=states.dtype, device=states.device)
            for states in (key_states, value_states)
        ]
        self.keys, self.values = room
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self._take_room(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start, end = self._of.seen, self._of.seen + key_states.shape[-2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._of.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self._of.seen

    def get_max_length(self) -> int:
        return self._of.length
