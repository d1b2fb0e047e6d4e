"""The model that is trained: built from its config, filled tensor by tensor, partitioned as it fills under ZeRO-3.

transformers' own loader merges a whole checkpoint in the memory of every process before DeepSpeed partitions it,
and it initialises weights that are partitioned already. Here no process ever holds more than one whole tensor
beside its own part.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import empty_model


def load_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, partitioning: dict[str, Any] | None
) -> PreTrainedModel:
    """A causal language model with the checkpoint's weights, which need no gradients yet.

    Args:
        partitioning: DeepSpeed's configuration where ZeRO-3 shares out the parameters; all processes call at once.
    """
    model = empty_model(checkpoint.config, dtype, device)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each parameter: tied ones have several
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    for key, targets in places.items():
        tensor = _tensor(checkpoint, names[key], device, dtype, partitioned=partitioning is not None)
        parameter = nn.Parameter(tensor, requires_grad=False)
        if partitioning is not None:
            _partition(parameter, partitioning)
        for module, name in targets:
            module._parameters[name] = parameter
    model.config.use_cache = False
    return model


def partition(module: nn.Module, partitioning: dict[str, Any]) -> None:
    """Share out the parameters of a module that are still whole; the first process's values count."""
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=partitioning)


def _partition(parameter: nn.Parameter, partitioning: dict[str, Any]) -> None:
    holder = nn.Module()
    holder.register_parameter("only", parameter)
    partition(holder, partitioning)


def _tensor(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, partitioned: bool) -> Tensor:
    """A tensor of the checkpoint; where parameters are partitioned, the first process sends it to the others."""
    if partitioned and torch.distributed.get_rank():
        return torch.empty(checkpoint.entries[name].shape, dtype=dtype, device=device)
    return checkpoint.read(name).to(device, dtype)
