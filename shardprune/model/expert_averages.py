"""Weighted averages of stored tensors of experts, of which one expert is made.

HC-SMoE (arXiv 2410.08589) averages the weights of a cluster's experts by how many tokens are routed to each.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardprune.storage.records import KeptExperts

Sources = Sequence[tuple[int, int]]  # experts of the dense model, each with its weight in an average


def average(sources: Sources, read: Callable[[int], Tensor]) -> Tensor:
    """Return the weighted average of tensors, summed up in float64 and rounded to their dtype; a single one as it is.

    Args:
        read: returns the tensor of an expert. They are read one after the other, in the order of `sources`.
    """
    (first, weight), *others = sources
    tensor = read(first)
    if not others:
        return tensor
    dtype, total = tensor.dtype, tensor.double().mul_(weight)
    for expert, weight in others:
        total.add_(read(expert), alpha=weight)
    return total.div_(sum(weight for _, weight in sources)).to(dtype)


def rows_of(tensor: Tensor, dimension: int, experts: KeptExperts, own: bool) -> Tensor:
    """Return what some experts leave of a tensor that has one row for each expert of the dense model along a dimension.

    Args:
        own: rows are the experts' own, as their biases are, and averaged where these are; else a router's.
    """
    if not own or not experts.members:
        return tensor.index_select(dimension, torch.tensor(experts.kept)).contiguous()
    sources = map(experts.sources, range(len(experts.kept)))
    return torch.stack([average(one, lambda expert: tensor.select(dimension, expert)) for one in sources], dimension)
