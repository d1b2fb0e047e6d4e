"""All tokens of a wave through every expert of a layer's mixtures, beside those that the routers choose."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardprune.model.experts import Expert


class AllTokens:
    """Passes of all tokens through the experts of mixtures, each before the mixture's own pass.

    Args:
        mixtures: the modules that hold experts, by their paths in the layer.
        projections: names of those whose experts are wanted; all others are spared.

    `under_way` says whether such a pass is going on, and not the mixture's own.
    """

    def __init__(self, mixtures: dict[str, nn.Module], projections: Collection[str]) -> None:
        self._mixtures, self._projections = mixtures, projections
        self.under_way = False

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Add the passes while the block lasts."""
        hooks = [
            mixture.register_forward_pre_hook(
                lambda module, positional, keywords, path=path: self._pass(path, module, positional, keywords),
                with_kwargs=True,
            )
            for path, mixture in self._mixtures.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pass(self, path: str, mixture: nn.Module, positional: Sequence[Any], keywords: dict[str, Any]) -> None:
        """Send all tokens to one expert after the other, through the code of the class; nothing becomes of outputs."""
        self.under_way = True
        try:
            for name, expert in mixture.named_children():
                part = f"{path}.{name}."
                if isinstance(expert, Expert) and any(one.startswith(part) for one in self._projections):
                    hidden, *routing = positional
                    chosen = {key: all_to(int(name), value) for key, value in keywords.items()}
                    # Not by a call, which would run this hook again.
                    mixture.forward(hidden, *(all_to(int(name), value) for value in routing), **chosen)
        finally:
            self.under_way = False


def all_to(expert: int, routing: Tensor) -> Tensor:
    """Return the indices or weights [tokens, chosen] of a router as [tokens, 1]: all tokens to one expert."""
    one = routing[:, :1]
    return torch.ones_like(one) if one.is_floating_point() else torch.full_like(one, expert)
