"""Partitioning of parameters over the processes, as ZeRO-3 has them: each process holds a range of every tensor.

DeepSpeed's own `zero.Init` broadcasts whole tensors from rank 0 before it partitions them. Here every process brings
its range itself, so that a model is read by all of them at once and nothing is sent.
"""

from collections.abc import Iterator
from typing import Any  # of parameters to which DeepSpeed adds attributes

import deepspeed
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import is_zero_param
from torch import nn

from shardprune.model.checkpoint import Checkpoint


class Partitioning:
    """ZeRO-3's partitioning of a model's parameters.

    Args:
        config: DeepSpeed's.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._zero = deepspeed.zero.Init(config_dict_or_path=config)

    def load(self, checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
        """Load this process's range of a tensor of the checkpoint, as a partitioned parameter."""
        shape = checkpoint.entries[name].shape
        parameter: Any = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        self._zero._convert_to_deepspeed_param(parameter)
        start, stop = self._range(parameter)
        parameter.data.view(-1)[start:stop].copy_(checkpoint.read_elements(name, start, stop))
        parameter.partition()
        return parameter

    def partition(self, module: nn.Module) -> None:
        """Partition the parameters of a module that are whole, and the same in all processes."""
        parameters: Iterator[Any] = module.parameters()
        for parameter in parameters:
            if not is_zero_param(parameter):
                self._zero._convert_to_deepspeed_param(parameter)
                parameter.partition()

    def _range(self, parameter: Any) -> tuple[int, int]:
        """Return the first of the elements that this process has of a parameter, and the first after them."""
        if self._zero.zero_param_process_group is not None:  # hpZ: the processes of a node share another copy
            return 0, parameter.numel()
        size = parameter.aligned_size() // parameter.ds_zero_partition_world_size
        start = min(size * parameter.ds_zero_partition_rank, parameter.numel())
        return start, min(start + size, parameter.numel())


def forget_modules() -> None:
    """Let DeepSpeed forget the modules of forward passes, whose engines' hooks hold all that these have."""
    FWD_MODULE_STACK.clear()


def release(model: nn.Module) -> None:
    """Free the memory of the parameters of a partitioned model, or one around it, which are of no use any more.

    DeepSpeed keeps models whose engines are destroyed: in the stack of modules in a forward pass, which begins with
    each engine's, and among the keys of a cache.
    """
    parameters: Iterator[Any] = model.parameters()
    for parameter in parameters:
        for held in (parameter, parameter.ds_tensor) if is_zero_param(parameter) else (parameter,):
            held.data = torch.empty(0, device=held.device, dtype=held.dtype)
