"""What turns finished layer files into an ordinary checkpoint: the frame, the index, config and tokenizer."""

import math
from typing import Any

from shardprune.checkpoint import CONFIG, INDEX, Checkpoint
from shardprune.journal import Journal
from shardprune.safetensors_file import read_header
from shardprune.skeleton import Skeleton


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
