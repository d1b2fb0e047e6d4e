"""Experts of mixtures in a training.

DeepSpeed sums gradients over processes in the order in which they come. Which experts see tokens differs between
processes, and so would that order: the gradients of a mixture's experts come all at once, zeros for those that saw no
token.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from shardprune.model.experts import Part, mixtures, stacks_of


class _Together(torch.autograd.Function):
    """Tensors as they are, whose gradients come all at once; zeros for those that nothing was computed with."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def own_weights(model: nn.Module) -> None:
    """Give the parts of all experts weights of their own, which can be trained one by one."""
    for _, stack in stacks_of(model):
        stack.separate()


def train_together(model: nn.Module) -> None:
    """Let the trained parameters of each mixture have their gradients at once, those of its updated parts too."""
    for mixture, stack in stacks_of(model):
        for expert, parts in enumerate(stack.parts):
            parts[:] = [cast(Part, mixture.get_submodule(f"{expert}.{name}")) for name in stack.names]
    for mixture in mixtures(model).values():
        mixture.__dict__["forward"] = partial(_forward, mixture, mixture.forward)


def _forward(mixture: nn.Module, forward: Any, *inputs: Any, **keywords: Any) -> Any:
    """Run a mixture with stand-ins for its trained parameters."""
    trained = [
        (module, name, parameter)
        for module in mixture.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    if not trained or not torch.is_grad_enabled():
        return forward(*inputs, **keywords)
    try:
        for (module, name, _), alias in zip(trained, _Together.apply(*(one[2] for one in trained)), strict=True):
            module._parameters[name] = alias
        return forward(*inputs, **keywords)
    finally:
        for module, name, parameter in trained:
            module._parameters[name] = parameter


def keep_from_deepspeed(model: nn.Module) -> None:
    """Make the frozen weights of experts plain tensors: DeepSpeed sends every parameter to the other processes, which
    have read them themselves, and takes none that are parts of others."""
    for _, stack in stacks_of(model):
        for part in (part for parts in stack.parts for part in parts):
            if not part.weight.requires_grad:
                part.__dict__["weight"] = part._parameters.pop("weight")


def kept_weights(layer: nn.Module) -> Iterator[str]:
    """Yield the names of the weights of a layer that were made plain tensors."""
    yield from (f"{path}.weight" for path, module in layer.named_modules() if "weight" in vars(module))
