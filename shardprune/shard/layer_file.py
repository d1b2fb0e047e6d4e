"""From a decoder layer in memory to its finished file."""

import math
from typing import Any

from torch import Tensor, nn

from shardprune.checkpoint import Checkpoint
from shardprune.journal import Journal
from shardprune.skeleton import Skeleton


def write_layer(
    journal: Journal,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    layer: nn.Module,
    changed: set[str],
    record: dict[str, Any],
    position: int | None = None,
) -> int:
    """Write a layer with a record of what was done to it, in the dtypes of the checkpoint; its tensors' bytes.

    Parameters in `changed` and those with another shape than the checkpoint's are written as they are in memory,
    all others byte by byte as the checkpoint has them.

    Args:
        index: of the layer in the checkpoint.
        position: its index in the model that is written, where others before it are gone.
    """
    prefix = f"{skeleton.family.layers}.{index}."
    place = prefix if position is None else f"{skeleton.family.layers}.{position}."
    parameters = dict(layer.named_parameters())
    entries = {name: checkpoint.entries[prefix + name] for name in parameters}

    def tensor(placed: str) -> Tensor:
        name = placed.removeprefix(place)
        if prefix + name in changed or parameters[name].shape != entries[name].shape:
            return parameters[name].to(entries[name].dtype)
        return checkpoint.read(prefix + name)

    shapes = {place + name: (entry.dtype, tuple(parameters[name].shape)) for name, entry in entries.items()}
    journal.write_layer(index if position is None else position, shapes, tensor, record)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
