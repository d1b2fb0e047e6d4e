"""Files of the new checkpoint: layers, frame (everything beside the layers), index, config and tokenizer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardprune.errors import InputError, StorageError
from shardprune.model.checkpoint import INDEX, Checkpoint
from shardprune.model.config_file import CONFIG, config_text, raw_config, with_changes
from shardprune.model.families import Family
from shardprune.model.skeleton import Skeleton
from shardprune.storage.folder import Folder
from shardprune.storage.journal import Journal
from shardprune.storage.json_file import parse_json
from shardprune.storage.records import LayerRecord
from shardprune.storage.safetensors_file import read_header

CODE = "auto_map"  # the field of a config that names classes in Python files beside it


def overflow(tensor: str, dtype: torch.dtype) -> str:
    """Return the reason of an error about a tensor that the dtype in which it is stored cannot hold."""
    name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return f"the {tensor} overflows {name}, in which it is stored (up to {largest:.5g}), or is not finite"


def write_frame(checkpoint: Checkpoint, skeleton: Skeleton, journal: Journal) -> None:
    """Copy every tensor that is not part of a decoder layer, as it is read: FP8 weights without their scales."""
    inside = {name for index in range(skeleton.layers) for name in skeleton.layer_tensors(index)}
    outside = [name for name in checkpoint.entries if name not in inside]
    tensors = {checkpoint.stored_name(name): checkpoint.stored(name) for name in outside}
    journal.copy_frame(tensors)
    checkpoint.check_unchanged(outside)


def write_index(checkpoint: Checkpoint, journal: Journal, changes: dict[str, Any]) -> None:
    """Write the index of all files, then config, tokenizer and the other files beside the weights.

    The config says whether the head is a tensor of its own, as the files do: not all readers look at the files.

    Args:
        changes: new values of fields of the language model's config.

    Raises:
        StorageError: a file that was written is not there any more, or not what was written.
    """
    placed, size, parameters = {}, 0, 0
    for file in [journal.frame_file, *(journal.layer_file(index) for index in range(journal.layers))]:
        try:
            entries, _ = read_header(journal.folder, file)
        except InputError as error:
            raise StorageError(error.field, error.problem) from error
        for name, entry in entries.items():
            placed[name] = file
            size += entry.size
            parameters += math.prod(entry.shape)
    journal.folder.write_json(
        INDEX, {"metadata": {"total_size": size, "total_parameters": parameters}, "weight_map": placed}
    )
    for name in checkpoint.companions():
        if name == CONFIG and (changes or checkpoint.own_head or checkpoint.fp8):
            raw = {key: value for key, value in raw_config(checkpoint.folder).items() if key != CODE}
            dtype = str(checkpoint.fp8.dtype).removeprefix("torch.") if checkpoint.fp8 else None
            changed = with_changes(raw, changes, tower=checkpoint.has_tower, untied=checkpoint.own_head, dtype=dtype)
            journal.folder.write_text(CONFIG, config_text(changed))
        else:
            journal.folder.write_bytes(name, _without_code(checkpoint.folder, name))


def _without_code(folder: Folder, name: str) -> bytes:
    """Return the content of a file beside the weights, without what names code of the checkpoint's own: it is not
    copied, as transformers' own classes have computed everything."""
    content = folder.read_bytes(name)
    if not name.endswith(CONFIG) or f'"{CODE}"'.encode() not in content:
        return content
    fields = parse_json(content, infinities=True)
    if not isinstance(fields, dict) or CODE not in fields:
        return content
    return config_text({key: value for key, value in fields.items() if key != CODE}).encode()


def write_layer(
    journal: Journal,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    layer: nn.Module,
    changed: set[str],
    record: LayerRecord,
) -> int:
    """Write a pruned layer and the record of its pruning, in the dtypes of the checkpoint; return its bytes.

    Parameters in `changed` (names in the checkpoint) and those whose shape has changed are written from memory, all
    others are copied from the checkpoint byte by byte.

    Args:
        index: of the layer in the checkpoint. The record has its index in the new model, which is another one if layers
            before it were removed.
    """
    tensors = changed_tensors(checkpoint, skeleton.family, index, layer, changed)
    return write_tensors_of_layer(journal, checkpoint, skeleton.family, index, shapes_of(layer), tensors.get, record)


def changed_tensors(
    checkpoint: Checkpoint, family: Family, index: int, layer: nn.Module, changed: set[str]
) -> dict[str, Tensor]:
    """Return the tensors of a layer that are written from memory, by their names within it, in the checkpoint's
    dtypes: those in `changed` and those whose shape has changed. Where a dtype is the parameter's own, the tensor is
    the parameter."""
    prefix = f"{family.layers}.{index}."
    tensors = {}
    for name, parameter in layer.state_dict(keep_vars=True).items():
        entry = checkpoint.entries[prefix + name]
        if parameter.shape != entry.shape or prefix + name in changed:
            tensors[name] = parameter.detach().to(entry.dtype)
    return tensors


def shapes_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's parameters and persistent buffers by their names within it."""
    return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}


def write_tensors_of_layer(
    journal: Journal,
    checkpoint: Checkpoint,
    family: Family,
    index: int,
    shapes: Mapping[str, tuple[int, ...]],
    changed_tensor: Callable[[str], Tensor | None],
    record: LayerRecord,
) -> int:
    """Write a layer tensor by tensor, in the dtypes of the checkpoint; return its bytes.

    Args:
        index: of the layer in the checkpoint.
        shapes: by name within the layer, of the tensors as they are written.
        changed_tensor: returns the new tensor of a name within the layer, or None to copy the checkpoint's.
        record: has the layer's index in the new model, which is another one if layers before it were removed.
    """
    prefix = f"{family.layers}.{index}."
    place = f"{family.layers}.{record.layer}."

    def tensor(placed: str) -> Tensor:
        name = placed.removeprefix(place)
        changed = changed_tensor(name)
        return checkpoint.read(prefix + name) if changed is None else changed.to(stored[placed][0])

    stored = {place + name: (checkpoint.entries[prefix + name].dtype, shape) for name, shape in shapes.items()}
    journal.write_layer(stored, tensor, record)
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in stored.values())
