"""The plan of a fine-tuning: memory, traffic and seconds of every way to share it out, and which of them fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.checks import check_full, check_rank, check_seqlen
from shardprune.model.head_logits import head_logits
from shardprune.model.skeleton import Skeleton
from shardprune.model.vision import SEEING, check_same_sight, image_shape
from shardprune.planning.described_model import DescribedModel, read_description
from shardprune.planning.hardware import SPARE_HOST, Hardware
from shardprune.planning.training.images import Images, Tower, as_large, repeated, square, tower_of
from shardprune.planning.training.memory import Memory, Sizes, Stage, memory_of_training, sizes_of
from shardprune.planning.training.need import paths_of_projections, stages_of
from shardprune.planning.training.passes import Uncounted
from shardprune.planning.training.recipe import TrainingPlanRecipe
from shardprune.planning.training.seconds import Work, work_of
from shardprune.recovery.batches import micro_batch_of
from shardprune.recovery.teacher_store import bytes_per_prediction, check_top
from shardprune.shard.device_room import device_room
from shardprune.storage.retrying import preflight


@dataclass(frozen=True)
class Learned:
    """What sizes depend on: a recipe with one of its ways."""

    full: bool
    keep_sparsity: bool
    lora_rank: int
    lora_alpha: float
    dropout: float
    seed: int
    zero: int
    recompute: bool


@dataclass(frozen=True)
class Way:
    """One way to share a training out, and what it takes.

    Attributes:
        memory: of one process.
        node: bytes of the host's memory for the processes of a node.
        device_room, node_room: bytes that there are.
        work: operations, traffic and seconds of a step.
    """

    stage: Stage
    recompute: bool
    memory: Memory
    node: int
    device_room: int
    node_room: int
    work: Work

    @property
    def fits(self) -> bool:
        return self.memory.device.peak <= self.device_room and self.node <= self.node_room

    @property
    def options(self) -> str:
        """The options of `shardprune recover` that choose it."""
        flags = (" --offload" if self.stage.offload else "") + (" --recompute" if self.recompute else "")
        return f"--zero {self.stage.zero}{flags}"

    def as_json(self) -> dict[str, Any]:
        device, host = self.memory.device, self.memory.host
        return {
            "zero": self.stage.zero,
            "offload": self.stage.offload,
            "recompute": self.recompute,
            "fits": self.fits,
            "device": {**asdict(device), "peak": device.peak, "room": self.device_room},
            "host": {**asdict(host), "peak": host.peak, "node": self.node, "room": self.node_room},
            **asdict(self.work),
        }


@dataclass(frozen=True)
class TrainingPlan:
    """The result of `shardprune plan-recovery`: a way each for those that the recipe leaves open.

    Attributes:
        tower: that sees the images of rows, its tokens and operations those of one; None without images.
        image_size: width and height of the images.
    """

    recipe: TrainingPlanRecipe
    parameters: int
    trained: int
    micro_batch: int
    ways: list[Way]
    tower: Tower | None = None
    image_size: tuple[int, int] | None = None

    @property
    def teacher_bytes(self) -> int | None:
        """The bytes that are stored of the teacher's predictions of one token, if they are."""
        top = self.recipe.teacher_top
        return None if top is None else bytes_per_prediction(top)

    @property
    def fits(self) -> bool:
        """Whether any of the ways fits."""
        return any(way.fits for way in self.ways)

    @property
    def chosen(self) -> Way | None:
        """The fastest way that fits; of equal ones the first."""
        return min((way for way in self.ways if way.fits), key=lambda way: way.work.seconds, default=None)

    def as_json(self) -> dict[str, Any]:
        return {
            "version": 1,
            "recipe": self.recipe.record(),
            "parameters": self.parameters,
            "parameters_trained": self.trained,
            "micro_batch": self.micro_batch,
            "teacher_bytes_per_token": self.teacher_bytes,
            "tower": self.tower.as_json() if self.tower else None,
            "image_size": self.image_size,
            "fits": self.fits,
            "chosen": self.chosen.options if self.chosen else None,
            "ways": [way.as_json() for way in self.ways],
        }


@preflight()
def plan_training(recipe: TrainingPlanRecipe) -> TrainingPlan:
    """Plan a fine-tuning; no weight is read.

    Raises:
        InputError: the model or the teacher cannot be read, they predict different tokens, or `recover` does not train
            such a model, rows of such a length, or updates of such a rank.
    """
    described = read_description(recipe.model)
    of_teacher = read_description(recipe.teacher, "teacher") if recipe.teacher else None
    config, teacher = described.config, of_teacher.config if of_teacher else None
    if teacher is not None and teacher.vocab_size != config.vocab_size:
        raise InputError(
            "teacher", f"{recipe.teacher} predicts {teacher.vocab_size} tokens, the model {config.vocab_size}"
        )
    if recipe.teacher_top is not None:
        check_top(recipe.teacher_top, config.vocab_size)
    skeleton = Skeleton(config, "cpu")
    check_seqlen(recipe.length, skeleton, "length")
    head_logits(config)  # which a training has to know
    if recipe.full:
        check_full(skeleton)
    else:
        check_rank(recipe.lora_rank, skeleton)
    teaching = _skeleton_of_teacher(teacher, recipe.length) if teacher else None
    stages = stages_of(recipe.zero, *(one for one in (skeleton, teaching) if one))
    micro = recipe.micro_batch or micro_batch_of(recipe.batch, recipe.processes, recipe.length)
    images = _images(recipe, described, of_teacher)
    tower = _tower(recipe, images) if images else None
    ways, trained = [], 0
    for stage, recompute in _ways(recipe, micro, stages):
        sizes = _sizes(recipe, skeleton, teacher, images, micro, recompute, stage.zero)
        trained = sizes.trained
        ways.append(_way(recipe, recipe.row, skeleton, teaching, sizes, stage, recompute))
    shape = image_shape(images.model) if images else None
    size = recipe.pixels or ((shape[2], shape[1]) if shape else None)
    return TrainingPlan(recipe, skeleton.parameters(), trained, micro, ways, tower, size)


def _skeleton_of_teacher(config: PretrainedConfig, length: int) -> Skeleton:
    """Return the skeleton of a teacher of rows of `length` tokens.

    Raises:
        InputError: no skeleton is made of its config, or it has fewer positions; names `teacher`.
    """
    try:
        skeleton = Skeleton(config, "cpu")
    except InputError as error:
        raise InputError("teacher", error.problem) from error
    check_seqlen(length, skeleton, "teacher")
    return skeleton


def _images(recipe: TrainingPlanRecipe, model: DescribedModel, teacher: DescribedModel | None) -> Images | None:
    """Return the images of a recipe's rows, if they show any.

    Raises:
        InputError: the model or the teacher does not see them.
    """
    if recipe.images is None:
        return None
    if model.whole.model_type not in SEEING:
        reason = f"model_type {model.whole.model_type!r} is not trained on images, only {', '.join(SEEING)}"
        raise InputError("images", reason)
    if teacher is not None:
        check_same_sight(teacher.whole, model.whole, str(recipe.teacher))
    image = _image(recipe, model.whole)
    shown = None if image is None else repeated(image, recipe.images_per_row)
    return Images(recipe.images_per_row, model.whole, teacher.whole if teacher else None, shown)


def _image(recipe: TrainingPlanRecipe, config: PretrainedConfig) -> dict[str, Tensor] | None:
    """Return what the model is given of an image of the recipe's size; None if the recipe has none.

    Raises:
        InputError: the model's images have no such size, or it has to be said.
    """
    kind = f"model_type {config.model_type!r}"
    if recipe.pixels is None:
        if image_shape(config) is None:
            raise InputError("image_size", f"has to be said, as 1280x720: {kind} sees images as large as they are")
        return None
    image = as_large(config, *recipe.pixels)
    if image is None:
        raise InputError("image_size", f"is not for {kind}, whose processor decides the size of images")
    return image


def _tower(recipe: TrainingPlanRecipe, images: Images) -> Tower:
    """Return what sees the images of rows.

    Raises:
        InputError: rows have no room for their images.
    """
    with _planned(recipe):
        tower = tower_of(images.model, _image(recipe, images.model) or square(images.model))
    shown = images.per_row * tower.tokens
    if shown >= recipe.length:
        reason = f"{recipe.length} has no room for images of {shown} tokens"
        raise InputError("length", f"{reason}; use more than these, or fewer images_per_row")
    return tower


@contextmanager
def _planned(recipe: TrainingPlanRecipe) -> Iterator[None]:
    """Name the model where its memory cannot be counted."""
    try:
        yield
    except Uncounted as error:
        reason = f"a training of {recipe.model} is not planned: its code looks at values ({error})"
        raise InputError("model", reason) from error


def _ways(recipe: TrainingPlanRecipe, micro: int, stages: Sequence[int]) -> Iterator[tuple[Stage, bool]]:
    """Yield the ways that a recipe leaves open, by stage."""
    gpu, count = recipe.row.gpu, recipe.processes
    for zero in stages:
        if zero == 0 and recipe.bf16:  # which `recover` does not do
            continue
        for offload in (False, True) if recipe.offload is None else (recipe.offload,):
            for recompute in (False, True) if recipe.recompute is None else (recipe.recompute,):
                if zero or not offload:
                    yield Stage(zero, offload, count, recipe.batch // (micro * count), gpu), recompute


def _sizes(
    recipe: TrainingPlanRecipe,
    skeleton: Skeleton,
    teacher: PretrainedConfig | None,
    images: Images | None,
    micro: int,
    recompute: bool,
    zero: int,
) -> Sizes:
    options = recipe.full, recipe.keep_sparsity, recipe.lora_rank, recipe.lora_alpha, recipe.dropout, recipe.seed
    learned = Learned(*options, zero=zero, recompute=recompute)
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    with _planned(recipe):
        models = skeleton.config, paths_of_projections(skeleton), teacher
        return sizes_of(*models, recipe.teacher_top, learned, dtype, micro, recipe.length, images)


def _way(
    recipe: TrainingPlanRecipe,
    row: Hardware,
    skeleton: Skeleton,
    teacher: Skeleton | None,
    sizes: Sizes,
    stage: Stage,
    recompute: bool,
) -> Way:
    memory = memory_of_training(sizes, stage)
    on_node = min(recipe.gpus, stage.processes)
    room = int(row.host * recipe.gpus * (1 - SPARE_HOST))
    host = memory.host if stage.gpu else memory.device
    return Way(
        stage=stage,
        recompute=recompute,
        memory=memory,
        node=on_node * host.peak,
        device_room=device_room(row.bytes) if stage.gpu else room,
        node_room=room,
        work=work_of(recipe, row, skeleton, teacher if recipe.teacher_top is None else None, sizes, stage, recompute),
    )
