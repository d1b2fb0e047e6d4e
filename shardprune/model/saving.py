"""What turns finished layer files into an ordinary checkpoint: the frame, the index, config and tokenizer."""

import math
from typing import Any

from torch import Tensor, nn

from shardprune.model.checkpoint import CONFIG, INDEX, Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord
from shardprune.storage.safetensors_file import read_header


def write_frame(checkpoint: Checkpoint, skeleton: Skeleton, journal: Journal) -> None:
    """Copy every tensor that is not part of a decoder layer, byte by byte."""
    inside = {name for index in range(skeleton.layers) for name in skeleton.layer_tensors(index)}
    outside = [name for name in checkpoint.entries if name not in inside]
    checkpoint.copy(outside, journal.folder, journal.frame_file, {})


def write_index(checkpoint: Checkpoint, journal: Journal, changes: dict[str, Any]) -> None:
    """Write the index of all files, then config, tokenizer and whatever else stands beside the weights.

    Args:
        changes: fields of the language model's config that are no longer those of the checkpoint.
    """
    placed, size, parameters = {}, 0, 0
    for file in [journal.frame_file, *(journal.layer_file(index) for index in range(journal.layers))]:
        for name, entry in read_header(journal.folder, file)[0].items():
            placed[name] = file
            size += entry.end - entry.start
            parameters += math.prod(entry.shape)
    journal.folder.write_json(
        INDEX, {"metadata": {"total_size": size, "total_parameters": parameters}, "weight_map": placed}
    )
    for name in checkpoint.companions():
        if name == CONFIG and changes:
            config = checkpoint.folder.read_json(CONFIG)
            (config["text_config"] if checkpoint.has_tower else config).update(changes)
            journal.folder.write_json(CONFIG, config)
        else:
            journal.folder.write_bytes(name, checkpoint.folder.read_bytes(name))


def write_layer(
    journal: Journal,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    layer: nn.Module,
    changed: set[str],
    record: LayerRecord,
) -> int:
    """Write a layer with its record, in the dtypes of the checkpoint; return its tensors' bytes.

    Parameters in `changed` and those with another shape than the checkpoint's are written as they are in memory,
    all others byte by byte as the checkpoint has them.

    Args:
        index: of the layer in the checkpoint. The record says its index in the model that is written, which is another
            one where layers before it are gone.
    """
    prefix = f"{skeleton.family.layers}.{index}."
    place = f"{skeleton.family.layers}.{record.layer}."
    parameters = dict(layer.named_parameters())
    entries = {name: checkpoint.entries[prefix + name] for name in parameters}

    def tensor(placed: str) -> Tensor:
        name = placed.removeprefix(place)
        if prefix + name in changed or parameters[name].shape != entries[name].shape:
            return parameters[name].to(entries[name].dtype)
        return checkpoint.read(prefix + name)

    shapes = {place + name: (entry.dtype, tuple(parameters[name].shape)) for name, entry in entries.items()}
    journal.write_layer(shapes, tensor, record)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
