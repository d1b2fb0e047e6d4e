"""Partial forward passes of a decoder layer: what enters a projection, and what output projections give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shardprune.model.stand_ins import Arguments


class _Reached(Exception):
    """Ends a layer's forward pass."""


@dataclass
class Taps:
    """The `inputs` [..., cols] that projections read, the `outputs` [wave, seqlen, hidden] of output projections in
    their order, and the layer's own output where the pass went on to the `end`."""

    inputs: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    end: Tensor | None = None


def tap(
    layer: nn.Module,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    arguments: Arguments,
    reader: str,
    outputs: Sequence[str],
    to_the_end: bool,
) -> Taps:
    """Run a wave [wave, seqlen, hidden] through a layer, no further than needed unless `to_the_end`.

    Args:
        weights: projections by name, in the place of the layer's own.
        arguments: of the layer's forward pass.
        reader: a projection whose inputs are wanted.
        outputs: the output projections up to and with the reader, in the order of the forward pass.
    """
    taps = Taps()

    def enters(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taps.inputs = inputs[0]
        if reader not in outputs and not to_the_end:
            raise _Reached

    def leaves(name: str, output: Tensor) -> None:
        taps.outputs.append(output.reshape(hidden.shape))
        if name == reader and not to_the_end:
            raise _Reached

    hooks = [layer.get_submodule(reader).register_forward_pre_hook(enters)]
    for name in outputs:
        hooks.append(
            layer.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, output, name=name: leaves(name, output)
            )
        )
    try:
        taps.end = run_with(layer, weights, hidden, arguments)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return taps


def run_with(layer: nn.Module, weights: Mapping[str, Tensor], hidden: Tensor, arguments: Arguments) -> Tensor:
    """Apply a decoder layer to hidden states [wave, seqlen, hidden] with some projections' weights, by their names, in
    the place of its own."""
    replaced = {f"{name}.weight": weight for name, weight in weights.items()}
    call = arguments.call(hidden)
    return call.image(torch.func.functional_call(layer, replaced, call.positional, call.keywords))
