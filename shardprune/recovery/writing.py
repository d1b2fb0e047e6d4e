"""The files of a trained model's checkpoint, written layer by layer.

Under ZeRO-3 the processes gather one layer at a time, and each layer is written by one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardprune.errors import TrainingError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import persistent_buffers
from shardprune.model.families import Family
from shardprune.model.saving import overflow, write_tensors_of_layer
from shardprune.model.skeleton import Skeleton
from shardprune.recovery.checkpoints import broadcast_from_rank_zero
from shardprune.recovery.experts import kept_weights
from shardprune.recovery.lowrank import UPDATES, LowRankLinear
from shardprune.recovery.masked_update import Way
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord, ProjectionReport


def write_layers(model: PreTrainedModel, family: Family, checkpoint: Checkpoint, journal: Journal, zero: int) -> None:
    """Write every unfinished layer with its low-rank updates merged. All processes call together.

    Raises:
        TrainingError: a trained tensor overflows the dtype in which it is stored; its layer is not written.
    """
    finished = broadcast_from_rank_zero(journal.finished if dist.get_rank() == 0 else None)
    for index, layer in enumerate(model.get_submodule(family.layers)):
        if index in finished:
            continue
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        with _whole(trained, zero):  # frozen parameters are copied from the checkpoint
            if dist.get_rank() == index % dist.get_world_size():
                _write_layer(layer, index, family, checkpoint, journal)
    dist.barrier()


def write_trained_frame(
    model: PreTrainedModel, skeleton: Skeleton, checkpoint: Checkpoint, journal: Journal, zero: int
) -> None:
    """Write the frame: everything beside the model's layers, trained or not. All processes call together.

    Raises:
        TrainingError: a trained tensor overflows the dtype in which it is stored; nothing is written.
    """
    inside = {name for index in range(skeleton.layers) for name in skeleton.layer_tensors(index)}
    names = [name for name in checkpoint.entries if name not in inside]
    parameters = {name: value for name, value in model.named_parameters(remove_duplicate=False) if name in names}
    frame: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        with _whole([parameter], zero):
            if dist.get_rank() == 0:
                frame[name] = _stored(parameter.detach().to("cpu", copy=True), checkpoint.entries[name].dtype, name)
    if dist.get_rank() == 0:
        tensors = {
            checkpoint.stored_name(name): frame[name] if name in frame else checkpoint.read(name) for name in names
        }
        journal.write_frame(tensors)
    dist.barrier()


def _write_layer(layer: nn.Module, index: int, family: Family, checkpoint: Checkpoint, journal: Journal) -> None:
    prefix = f"{family.layers}.{index}."
    modules = {f"{name}.weight": layer.get_submodule(name) for name in family.kinds[index].projections}
    updated = {name: module for name, module in modules.items() if isinstance(module, LowRankLinear)}
    parameters = {name: value for name, value in layer.named_parameters() if not name.endswith(UPDATES)}

    def trained(name: str) -> Tensor | None:
        # In the stored dtype, to which it is written and in which zeros are counted: rounding can make further ones.
        dtype, label = checkpoint.entries[prefix + name].dtype, f"layer {index} {name}"
        if name in updated:
            return _stored(updated[name].merged(checkpoint.read(prefix + name)), dtype, label)
        moved = name in parameters and parameters[name].requires_grad
        return _stored(parameters[name], dtype, label) if moved else None

    def report(projection: str) -> ProjectionReport:
        name = f"{projection}.weight"
        before, after = checkpoint.read(prefix + name), trained(name)
        way = updated[name].way if name in updated else None
        return _report(index, projection, before, before if after is None else after, way)

    record = LayerRecord(index, tuple(report(projection) for projection in family.kinds[index].projections))
    names = (*parameters, *kept_weights(layer), *persistent_buffers(layer))
    shapes = {name: checkpoint.entries[prefix + name].shape for name in names}
    write_tensors_of_layer(journal, checkpoint, family, index, shapes, trained, record)


def _stored(trained: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """Return a trained tensor in the dtype in which it is stored.

    Raises:
        TrainingError: it overflows; names it by its `label`.
    """
    rounded = trained.detach().to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise TrainingError(f"{label}: {overflow('trained tensor', dtype)}; a lower learning rate may help")
    return rounded


def _report(layer: int, name: str, before: Tensor, after: Tensor, way: Way | None) -> ProjectionReport:
    """Count the zeros of a projection before and after training."""
    was, zero = before == 0, (after == 0).cpu()
    weights, zeros_before = was.numel(), int(was.sum())
    return ProjectionReport(
        layer,
        name,
        target=zeros_before / weights,
        zeros=int(zero.sum()),
        zeros_before=zeros_before,
        weights=weights,
        update=way,
        zeros_kept=int((was & zero).sum()),
    )


@contextmanager
def _whole(parameters: list[nn.Parameter], zero: int) -> Iterator[None]:
    """Gather partitioned parameters for the duration of the block."""
    if zero < 3:
        yield
        return
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
        yield
