"""Stand-ins for decoder layers: a model runs as it is written, but given functions take the place of its layers."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

StandIn = Callable[..., Any]


@dataclass(frozen=True)
class Arguments:
    """What a model passes to a decoder layer beside the hidden states."""

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def split(positional: tuple[Any, ...], keywords: dict[str, Any]) -> "tuple[Tensor, Arguments]":
        """Return the hidden states of a call of a layer, and its other arguments."""
        if positional:
            return positional[0], Arguments(positional[1:], keywords)
        others = dict(keywords)
        return others.pop("hidden_states"), Arguments((), others)


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


def as_returned(hidden: Tensor, returned: int) -> Any:
    """Return hidden states as a layer does: alone, or as the first of a tuple of a length."""
    return (hidden, *[None] * (returned - 1)) if returned else hidden
