"""Checkpoints of int8 weights, by torchao: one scale for each output, none for zero, so that zeros stay zeros."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from shardprune.errors import ConversionError, InputError
from shardprune.model.auto_class import auto_class_of
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.config_file import in_one_line


def check_int8(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint's weights can be made int8.

    Raises:
        InputError: torchao is not installed, or the language model is a part of a larger one.
    """
    if find_spec("torchao") is None:
        raise InputError("format", "'torchao' needs torchao: pip install 'shardprune[torchao]'")
    if checkpoint.has_tower:
        raise InputError("format", f"'torchao' takes language models, and {checkpoint.folder.url} has other parts, too")


def write_int8(checkpoint: Checkpoint, source: Path, to: Path) -> None:
    """Write a checkpoint whose linear layers have int8 weights [rows, cols] and a scale for each row, in the dtype of
    the others. Embeddings, head, norms and experts that are stacked in one tensor stay as they are. The host's memory
    holds the model once.

    Args:
        source: the checkpoint's files.
        to: folder to write.

    Raises:
        ConversionError: transformers or torchao make no such model, it has no linear layer, or a zero became another
            number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = _quantised(source, auto_class_of(checkpoint.config.model_type))
            _check_zeros(checkpoint, model)
            model.save_pretrained(to)
        except (ImportError, OSError, ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(
                f"torchao makes no int8 model of {checkpoint.folder.url}: {in_one_line(error)}"
            ) from error


def _quantised(source: Path, auto_class: str) -> PreTrainedModel:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    settings = TorchAoConfig(Int8WeightOnlyConfig())
    return getattr(transformers, auto_class).from_pretrained(source, quantization_config=settings, dtype="auto")


def _check_zeros(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    from torchao.quantization import Int8Tensor

    linear = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and isinstance(module.weight, Int8Tensor)
    }
    if not linear:
        raise _refused(checkpoint, "it has no linear layer")
    for name, weight in linear.items():
        zeros = checkpoint.read(name) == 0
        if bool(torch.any(weight.qdata[zeros] != 0)):
            raise ConversionError(f"torchao: a zero of {name} became another number")


def _refused(checkpoint: Checkpoint, reason: str) -> ConversionError:
    return ConversionError(f"torchao makes no int8 model of {checkpoint.folder.url}: {reason}")
