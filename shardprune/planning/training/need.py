"""What a process of a fine-tuning takes, for the check before any weight is read."""

import torch

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.planning.training.images import Images
from shardprune.planning.training.memory import Memory, Stage, memory_of_training, sizes_of
from shardprune.recovery.spec import DecidedRecipe
from shardprune.shard.spec import Need
from shardprune.storage.quantities import gigabytes

LISTED = 10**8  # bytes of a part from which on it is named


def paths_of_projections(skeleton: Skeleton) -> tuple[str, ...]:
    """Return the paths of all projections in the model."""
    family = skeleton.family
    layers = range(skeleton.layers)
    return tuple(f"{family.layers}.{index}.{name}" for index in layers for name in family.kinds[index].projections)


def stages_of(zero: int | None, *skeletons: Skeleton) -> tuple[int, ...]:
    """Return the stages of ZeRO that train such models, student and teacher: the one that is asked for, or all.

    Raises:
        InputError: the one that is asked for would partition the weights of experts, which are there whole while their
            mixture runs.
    """
    whole = any(skeleton.has_experts for skeleton in skeletons)
    if zero == 3 and whole:
        raise InputError("zero", "3 does not partition the experts of a mixture; use 0, 1 or 2")
    return (0, 1, 2) + (() if whole else (3,)) if zero is None else (zero,)


def training_memory(
    recipe: DecidedRecipe, skeleton: Skeleton, teacher: Checkpoint | None, length: int, images: Images | None = None
) -> Memory:
    """Return the memory of one process of a fine-tuning whose longest row has `length` tokens.

    Args:
        images: that the rows show; None without any.
    """
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    sizes = sizes_of(
        skeleton.config,
        paths_of_projections(skeleton),
        teacher.config if teacher else None,
        recipe.teacher_top,
        recipe,
        dtype,
        recipe.micro_batch,
        length,
        images,
    )
    accumulated = max(1, recipe.batch // (recipe.micro_batch * recipe.workers))
    stage = Stage(recipe.zero, recipe.offload, recipe.workers, accumulated, recipe.device == "cuda")
    return memory_of_training(sizes, stage)


def training_need(
    recipe: DecidedRecipe, skeleton: Skeleton, teacher: Checkpoint | None, length: int, images: Images | None = None
) -> Need:
    """Return the need of one process of a fine-tuning at its peak, and options that lower it.

    Args:
        length: tokens of the longest row. Micro-batches are padded to their longest row, not to the recipe's length.
        images: that the rows show; None without any.
    """
    parts = training_memory(recipe, skeleton, teacher, length, images).device
    step = ", ".join(f"{name} {gigabytes(count)}" for name, count in vars(parts).items() if count >= LISTED)
    fewer = [
        option
        for option, chosen in (
            ("--zero 3", recipe.zero == 3 or recipe.workers == 1),
            ("--offload", recipe.offload or recipe.device == "cpu"),
            ("--recompute", recipe.recompute),
            ("--micro-batch 1", recipe.micro_batch == 1),
        )
        if not chosen
    ]
    helps = f"{', '.join(fewer)} or more workers take less" if fewer else "more workers take less"
    return Need(parts.peak, step or "in a step", f"{helps}; `shardprune plan-recovery` says what fits")
