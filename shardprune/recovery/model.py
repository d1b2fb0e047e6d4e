"""The trained model, built from its config and filled tensor by tensor; under ZeRO-3 it is partitioned as it fills.

transformers' own loader merges a whole checkpoint in the memory of every process before DeepSpeed partitions it, and it
initialises weights that are partitioned already. Here no process ever holds more than one whole tensor beside its own
partition.
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
    """Load a causal language model with the checkpoint's weights; no parameter requires gradients.

    Args:
        partitioning: DeepSpeed's configuration if ZeRO-3 partitions the parameters; then all processes call together.
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
    """Partition the parameters of a module that are still whole; rank 0's values are used."""
    import deepspeed

    deepspeed.zero.Init(module=module, config_dict_or_path=partitioning)


def _partition(parameter: nn.Parameter, partitioning: dict[str, Any]) -> None:
    holder = nn.Module()
    holder.register_parameter("only", parameter)
    partition(holder, partitioning)


def _tensor(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype, partitioned: bool) -> Tensor:
    """Return a tensor of the checkpoint. With partitioned parameters only rank 0 reads it, and `partition` broadcasts
    it.
    """
    if partitioned and torch.distributed.get_rank():
        return torch.empty(checkpoint.entries[name].shape, dtype=dtype, device=device)
    return checkpoint.read(name).to(device, dtype)
