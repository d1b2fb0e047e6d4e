"""Ties of the input embedding and the output head, decided as transformers does when it loads a checkpoint.

A config says that both are one tensor, but the files decide: with two different tensors the model has a head of its
own, and one tensor alone serves as both, whichever it is.
"""

import math

import torch
from transformers import PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.causal_class import causal_class
from shardprune.storage.folder import CHUNK
from shardprune.storage.safetensors_file import StoredTensor


def tied_names(config: PretrainedConfig) -> tuple[str, str] | None:
    """Return the names of input embedding and head in the causal language model where a config ties them, else None.

    Raises:
        InputError: the model's class ties other tensors.
    """
    model_class = causal_class(config)
    ties = model_class._tied_weights_keys
    if not getattr(config, "tie_word_embeddings", False) or not ties:
        return None
    if not isinstance(ties, dict) or len(ties) != 1:
        raise InputError("model", f"{model_class.__name__} ties other tensors than its embeddings")
    ((head, embedding),) = ties.items()
    return embedding, head


def equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two tensors of a checkpoint have the same values; they are read up to the first difference."""
    if first.entry.shape != second.entry.shape:
        return False
    elements, step = math.prod(first.entry.shape), CHUNK // 4
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        one, other = (stored.read_elements(start, stop).float() for stored in (first, second))
        if not torch.equal(one, other):
            return False
    return True
