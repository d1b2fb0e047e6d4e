"""The trained model, built from its config and filled tensor by tensor; under ZeRO-3 it is partitioned as it fills.

transformers' own loader merges a whole checkpoint in the memory of every process before DeepSpeed partitions it, and it
initialises weights that are partitioned already. Here no process ever holds more than one whole tensor beside its own
partition.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import empty_model, persistent_buffers
from shardprune.model.experts import Part, allocate, take_apart
from shardprune.model.vision import StoredVision

if TYPE_CHECKING:  # evaluations load a model without DeepSpeed
    from shardprune.recovery.partitioning import Partitioning


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, partitioning: "Partitioning | None"
) -> PreTrainedModel:
    """Load a causal language model with the checkpoint's weights, its experts taken apart; no parameter requires
    gradients.

    Args:
        partitioning: if ZeRO-3 partitions the parameters; each process reads its own part of them.
    """
    model = empty_model(checkpoint.config, dtype, device)
    take_apart(model)
    allocate(model, device, dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter: tied ones have several
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    for key, targets in places.items():
        if isinstance(part := targets[0][0], Part):
            part.weight.copy_(checkpoint.read(names[key]))
            continue
        if partitioning is None:
            tensor = checkpoint.read(names[key]).to(device, dtype)
            parameter = nn.Parameter(tensor, requires_grad=False)
        else:
            parameter = partitioning.load(checkpoint, names[key], device, dtype)
        for module, name in targets:
            module._parameters[name] = parameter
    for name, buffer in persistent_buffers(model).items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = checkpoint.read(name).to(device, buffer.dtype)
    checkpoint.check_unchanged()
    model.config.use_cache = False
    return model


def load_seeing(
    checkpoint: Checkpoint, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Load what sees images for a checkpoint's language model, and return both together, without the head.

    Every process has a vision tower of its own, whole and frozen, that DeepSpeed does not know.
    """
    return StoredVision(checkpoint, dtype, device).load(model.base_model)
