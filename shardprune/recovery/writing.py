"""From a trained model to the files of an ordinary checkpoint, layer by layer.

Under ZeRO-3 the processes gather one layer at a time, and each layer is written by one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.families import Family
from shardprune.recovery.checkpoints import broadcast_from_rank_zero
from shardprune.recovery.lowrank import UPDATES, LowRankLinear
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord, ProjectionReport
from shardprune.storage.safetensors_file import write_tensors


def write_layers(model: PreTrainedModel, family: Family, checkpoint: Checkpoint, journal: Journal, zero: int) -> None:
    """Write every layer that is not yet written, low-rank updates merged. All processes call at once."""
    finished = broadcast_from_rank_zero(journal.finished if dist.get_rank() == 0 else None)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        if index in finished:
            continue
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        with _whole(trained, zero):  # what is not trained comes from the checkpoint
            if dist.get_rank() == index % dist.get_world_size():
                _write_layer(layer, index, family, checkpoint, journal)
    dist.barrier()


def write_trained_frame(
    model: PreTrainedModel, family: Family, checkpoint: Checkpoint, journal: Journal, zero: int
) -> None:
    """Write everything beside the layers, where that was trained, too. All processes call at once."""
    inside = f"{family.layers}."
    names = [name for name in checkpoint.entries if not name.startswith(inside)]
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if name in names}
    frame: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        with _whole([parameter], zero):
            if dist.get_rank() == 0:
                frame[name] = parameter.detach().to("cpu", checkpoint.entries[name].dtype, copy=True)
    if dist.get_rank() == 0:
        tensors = {
            checkpoint.stored_name(name): frame[name] if name in frame else checkpoint.read(name) for name in names
        }
        write_tensors(journal.folder, journal.frame_file, tensors, {})
    dist.barrier()


def _write_layer(layer: nn.Module, index: int, family: Family, checkpoint: Checkpoint, journal: Journal) -> None:
    prefix = f"{family.layers}.{index}."
    modules = {f"{name}.weight": layer.get_submodule(name) for name in family.projections}
    updated = {name: module for name, module in modules.items() if isinstance(module, LowRankLinear)}
    parameters = {name: value for name, value in layer.named_parameters() if not name.endswith(UPDATES)}
    entries = {name: checkpoint.entries[prefix + name] for name in parameters}

    def tensor(stored: str) -> Tensor:
        name = stored.removeprefix(prefix)
        if name in updated:
            return updated[name].merged(checkpoint.read(stored)).to(entries[name].dtype)
        if parameters[name].requires_grad:
            return parameters[name].detach().to(entries[name].dtype)
        return checkpoint.read(stored)

    reports = tuple(
        _report(index, name, checkpoint.read(f"{prefix}{name}.weight"), tensor(f"{prefix}{name}.weight"))
        for name in family.projections
    )
    shapes = {prefix + name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    journal.write_layer(shapes, tensor, LayerRecord(index, reports))


def _report(layer: int, name: str, before: Tensor, after: Tensor) -> ProjectionReport:
    """What became of a projection's zeros."""
    was, zero = before == 0, (after == 0).cpu()
    weights, zeros_before = was.numel(), int(was.sum())
    return ProjectionReport(
        layer,
        name,
        target=zeros_before / weights,
        zeros=int(zero.sum()),
        zeros_before=zeros_before,
        weights=weights,
        zeros_kept=int((was & zero).sum()),
    )


@contextmanager
def _whole(parameters: list[nn.Parameter], zero: int) -> Iterator[None]:
    """Have parameters whole in every process while the block lasts."""
    if zero < 3:
        yield
        return
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield
