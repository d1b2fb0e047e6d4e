"""Checks that checkpoints fit their config, a sparse one its dense original, and sequences the model."""

import torch

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.left_dense import NOT_RUN
from shardprune.model.skeleton import Skeleton
from shardprune.solvers.pattern import NM, Unstructured, parse_pattern

ROUNDING = 0.02  # tolerance for norms that were stored in another 16-bit dtype


def check_tensors(skeleton: Skeleton, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has every tensor that its config implies, in its shape.

    Raises:
        InputError: a tensor is missing, has another shape, or a dtype that is not pruned.
    """
    _check(checkpoint, skeleton, "the config implies")


def check_sparse(skeleton: Skeleton, sparse: Checkpoint, dense: Checkpoint, pattern: str) -> None:
    """Check that a checkpoint is a pruned form of a dense one.

    It must have the same tensors; those of the layers that are no projections (norms, biases) must be equal up to
    16-bit rounding; some projection must have a zero; and all projections must hold the `pattern`, unless it is `auto`.
    Projections are read up to the first zero, or all of them for the pattern.

    Raises:
        InputError: names the tensor that does not fit.
    """
    url = sparse.folder.url
    _check(sparse, skeleton, f"the dense model {dense.folder.url} has")
    projections = {
        skeleton.projection_tensor(index, name)
        for index in range(skeleton.layers)
        for name in skeleton.family.kinds[index].projections
    }
    inside = {name for index in range(skeleton.layers) for name in skeleton.layer_tensors(index)}
    for name in sparse.entries:
        known = name in inside or name in dense.entries or name.endswith("inv_freq")
        if name.startswith(f"{skeleton.family.layers}.") and not known:
            raise InputError("sparse", f"{url} has a tensor {name}, which the dense model {dense.folder.url} has not")
    for name in sorted(inside - projections):
        if not torch.allclose(sparse.read(name).float(), dense.read(name).float(), rtol=ROUNDING, atol=ROUNDING):
            raise InputError("sparse", f"tensor {name} is not that of {dense.folder.url}: more than pruning was done")
    wanted = None if pattern == "auto" else parse_pattern(pattern)
    zeros = False
    for name in sorted(projections):
        weight = sparse.read(name)
        zeros = zeros or bool((weight == 0).any())
        if wanted is None or isinstance(wanted, Unstructured):
            if zeros:
                return
        elif isinstance(wanted, NM) and not wanted.holds(weight):
            raise InputError("pattern", f"the zeros of {name} in {url} are not {pattern}; use auto or unstructured")
    if not zeros:
        raise InputError("sparse", f"{url} has no zeros in its projections; give a pruned checkpoint")


def _check(checkpoint: Checkpoint, skeleton: Skeleton, reason: str) -> None:
    field, url = checkpoint.folder.field, checkpoint.folder.url
    for name, shape in skeleton.tensors().items():
        if name not in checkpoint.entries:
            raise InputError(field, f"{url} has no tensor {name}, which {reason}")
        found = checkpoint.entries[name]
        if found.shape != shape:
            raise InputError(field, f"tensor {name} is {list(found.shape)}; {reason} {list(shape)}")
        if found.dtype not in (torch.float32, torch.float16, torch.bfloat16) and not skeleton.is_table(name):
            raise InputError(field, f"tensor {name} is {found.dtype}; use float32, float16 or bfloat16")


def check_seqlen(seqlen: int, skeleton: Skeleton, field: str = "seqlen") -> None:
    """Check that a model takes sequences of `seqlen` tokens.

    Rotary embeddings of the type `dynamic` are made for more positions than the config has; with any other, more would
    be another model.

    Raises:
        InputError: it has fewer positions.
    """
    config = skeleton.config
    limit = getattr(config, "max_position_embeddings", None)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if limit and seqlen > limit and rope != "dynamic":
        raise InputError(field, f"{seqlen} is more than the model's {limit} positions")


def check_rank(rank: int, skeleton: Skeleton) -> None:
    """Check that a low-rank update is smaller than what it updates.

    Raises:
        InputError: its rank is more than the default and than the rows and the columns of every projection.
    """
    largest = max(
        max(shape) for index in range(skeleton.layers) for shape in skeleton.projection_shapes(index).values()
    )
    if rank > largest:
        raise InputError("lora_rank", f"{rank} is more than any projection has rows or columns; use at most {largest}")


def check_full(skeleton: Skeleton) -> None:
    """Check that text trains all weights of a model.

    Raises:
        InputError: some of its layers are not run for text.
    """
    if resting := sum(not kind.runs for kind in skeleton.family.kinds):
        reason = f"text does not train all weights: {resting} of {skeleton.layers} layers are {NOT_RUN}"
        raise InputError("full", f"{reason}; leave it out, low-rank updates train the others")
