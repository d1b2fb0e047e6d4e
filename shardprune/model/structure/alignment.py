"""Widths that kernels and tensor parallelism like: how many neurons go together, and over how many devices a shape is
divided evenly."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from transformers import PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.structure.budget import Budget
from shardprune.model.structure.shape import Widths, costs_of, heads_of, possible_groups, widths_of

Multiple = int | Literal["auto"]

MULTIPLES = (256, 128, 64, 32)  # of neurons on each device, for tiles of kernels
MISS = 0.05  # of the neurons that go: how far a multiple may round them
DEGREES = (1, 2, 4, 8, 16)  # of tensor parallelism


def aligned(budget: Budget, widths: Widths, queries: int, amount: float, multiple: Multiple, parallel: int) -> Budget:
    """Return a budget whose widths suit so many devices: the numbers of groups that they divide evenly, or that divide
    them, with query heads that they divide; and of `auto`, the multiple of neurons.

    It is the largest of `MULTIPLES`, times the devices, that rounds what goes by at most `MISS`; the smallest if none
    does, or the layer has too few neurons for the amount; 1 where the model's own number is a multiple of none. One
    that is given is made one of the devices, too.

    Args:
        widths: of a layer, from which `amount` parameters go.
        queries: heads of a group.

    Raises:
        InputError: the model's own widths do not suit so many devices.
    """

    def suits(count: int) -> bool:
        return parallel in degrees(count, count * queries, parallel)

    groups = tuple(filter(suits, budget.groups))
    if widths.groups not in groups or widths.neurons % parallel:
        reason = f"the model's {widths.groups} key/value groups and {widths.neurons} neurons do not divide over so many"
        raise InputError("tensor_parallel", f"{parallel} is not allowed; {reason} devices")
    budget = replace(budget, groups=groups)
    if multiple != "auto":
        return replace(budget, multiple=math.lcm(multiple, parallel))
    known = [size * parallel for size in MULTIPLES if widths.neurons % (size * parallel) == 0]
    smallest = replace(budget, multiple=known[-1] if known else parallel)
    try:
        wanted = budget.narrowed(widths, amount).widths
    except ValueError:
        return smallest
    for size in known:
        try:
            found = replace(budget, multiple=size).narrowed(widths, amount).widths
        except ValueError:
            continue
        if abs(found.neurons - wanted.neurons) <= MISS * (widths.neurons - wanted.neurons):
            return replace(budget, multiple=size)
    return smallest


def narrowed_by(
    config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    share: float,
    multiple: Multiple = 1,
    parallel: int = 1,
) -> Widths:
    """Return the widths of a model after removing a share of every layer's projection weights.

    Args:
        shapes: [rows, cols] of a layer's projections by name.
        multiple: the number of neurons stays a multiple of it.
        parallel: devices that serve the model.

    Raises:
        InputError: they do not divide over the devices.
        ValueError: the layers have too few neurons.
    """
    costs = costs_of(config, {f"{name}.weight": shape for name, shape in shapes.items()})
    widths = widths_of(config)
    amount = share * costs.layer(widths)
    queries = heads_of(config).queries
    budget = aligned(Budget(costs, possible_groups(config)), widths, queries, amount, multiple, parallel)
    return budget.narrowed(widths, amount).widths


def degrees(groups: int, heads: int, neurons: int) -> list[int]:
    """Return the tensor parallelisms that engines take a shape with: query heads and neurons divide evenly, and so do
    key/value groups, or devices share them."""
    return [
        devices
        for devices in DEGREES
        if heads % devices == 0 and neurons % devices == 0 and (groups % devices == 0 or devices % groups == 0)
    ]
