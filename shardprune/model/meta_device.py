"""Models on the meta device, whose code may look at integers: those that have values keep them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

META = torch.device("meta")
COPY = torch.ops.aten._to_copy.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def on_meta(operation: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation of tensors of which some have values and others have none.

    Sizes of images and places of tokens have values, and keep them where a model's code would move them to the meta
    device, as it looks at them later. Where they meet tensors without, the result has none.
    """
    kwargs = kwargs or {}
    if operation is COPY and _has_integers(args[0]) and kwargs.get("device") == META:
        kwargs = {**kwargs, "device": args[0].device}
    if operation in INDEXING:  # of meta tensors by masks, how many are chosen is in the masks' values
        args = (args[0], _places(args[1]), *args[2:])
    if len({leaf.device for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}) > 1:
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
    return operation(*args, **kwargs)


def _places(indices: Any) -> list[Any]:
    """Return the indices of an operation, those that are masks with values as the places of what they choose."""
    places: list[Any] = []
    for index in indices:
        mask = isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta
        places += index.nonzero(as_tuple=True) if mask else [index]
    return places


def without_values(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the arguments of a model on the meta device, those that are no integers without values."""
    return {name: tensor if _has_integers(tensor) else tensor.to(META) for name, tensor in inputs.items()}


def _has_integers(tensor: Tensor) -> bool:
    return not (tensor.is_meta or tensor.is_floating_point())


class OnMeta(TorchDispatchMode):
    """Runs operations by `on_meta`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_meta(func, args, kwargs)
