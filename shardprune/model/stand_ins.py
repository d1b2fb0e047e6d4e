"""Stand-ins for decoder layers: a model runs as it is written, but given functions take the place of its layers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardprune.model.carried import Carried

StandIn = Callable[..., Any]


@dataclass(frozen=True)
class Arguments:
    """What a model passes to a decoder layer beside the hidden states.

    Attributes:
        carried: the columns of a wave, some of which are arguments of layer `index`; None where it is hidden states.
    """

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    carried: Carried | None = None
    index: int = 0

    @staticmethod
    def split(positional: tuple[Any, ...], keywords: dict[str, Any]) -> "tuple[Tensor, Arguments]":
        """Return the hidden states of a call of a layer, and its other arguments."""
        if positional:
            return positional[0], Arguments(positional[1:], keywords)
        others = dict(keywords)
        return others.pop("hidden_states"), Arguments((), others)

    def carried_by(self, carried: Carried, index: int) -> "Arguments":
        """Return the arguments of layer `index` for waves that carry some of them."""
        if carried.stateless:
            return self
        named = dict(zip(carried.names[1:], self.positional, strict=False))
        return Arguments((), {**named, **self.keywords}, carried, index)

    def call(self, wave: Tensor) -> "Call":
        """Return the layer's call for a wave [batch, seqlen, columns]."""
        if self.carried is None:
            return Call((wave, *self.positional), self.keywords)
        keywords = self.carried.entering(wave, self.index, self.keywords)
        return Call((self.carried.hidden_states(wave),), keywords, wave, self.carried)


@dataclass(frozen=True)
class Call:
    """The call of a layer for a wave: its arguments, and what its output makes of the wave."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    wave: Tensor | None = None
    carried: Carried | None = None

    def image(self, output: Any) -> Tensor:
        """Return the wave that the layer's output stands for, [batch, seqlen, columns]."""
        if self.carried is None:
            return output[0] if isinstance(output, tuple) else output
        assert self.wave is not None
        return self.carried.leaving(self.wave, output, self.keywords)


@contextmanager
def standing_in(layers: Iterable[nn.Module], stand_ins: Iterable[StandIn]) -> Iterator[None]:
    """Have each layer's forward pass done by its stand-in.

    The layers stay where they are: a model may read their attributes.
    """
    layers = list(layers)
    for layer, stand_in in zip(layers, stand_ins, strict=True):
        layer.__dict__["forward"] = stand_in
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


class Recorder:
    """A stand-in that records the hidden states and the arguments of its last call, and passes the hidden states on."""

    def __init__(self, returned: int) -> None:
        self.hidden: Tensor | None = None
        self.arguments = Arguments()
        self._returned = returned

    def __call__(self, *positional: Any, **keywords: Any) -> Any:
        self.hidden, self.arguments = Arguments.split(positional, keywords)
        return as_returned(self.hidden, self._returned)


def returning(hidden: Tensor, returned: int) -> StandIn:
    """Return a stand-in that returns given hidden states instead of its input."""
    return lambda *_positional, **_keywords: as_returned(hidden, returned)


def passing_on(hidden: Tensor, *_positional: Any, **_keywords: Any) -> Tensor:
    """Stand in for a layer that the model does not run."""
    return hidden


def as_returned(hidden: Tensor, returned: int) -> Any:
    """Return hidden states as a layer does: alone, or as the first of a tuple of a length."""
    return (hidden, *[None] * (returned - 1)) if returned else hidden
