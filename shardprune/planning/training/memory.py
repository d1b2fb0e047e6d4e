"""The memory of a training's process by part: what ZeRO's stages keep where, and what a pass takes beside it.

DeepSpeed's buffers are counted as its version 0.19 makes them (runtime/zero/stage_1_and_2.py, stage3.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PretrainedConfig

from shardprune.errors import InputError, first_line
from shardprune.model.empty_model import empty_model
from shardprune.model.experts import take_apart
from shardprune.model.head_logits import head_logits
from shardprune.planning.training.images import Images, Tower, completed, tower_of, with_sight
from shardprune.planning.training.passes import (
    META,
    Passes,
    Uncounted,
    count_forward,
    count_passes,
    meta_batch,
    meta_inputs,
)
from shardprune.recovery.distillation import (
    STORED,
    TOKENS,
    Distillation,
    TopDistillation,
    WholeDistillation,
    largest,
)
from shardprune.recovery.student import Student, Teacher
from shardprune.recovery.teacher_store import bytes_per_prediction
from shardprune.recovery.trained import Learning, choose_trained

BUCKET = 500_000_000  # elements of DeepSpeed's buckets of gradients
LIVE = 1_000_000_000  # elements of gathered weights that stage 3 keeps at most for their next use
PREFETCHED = 50_000_000  # elements that it gathers ahead
SUBGROUP = 1_000_000_000  # elements that its optimizer updates at a time
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements of what a training holds, and the bytes of what passes through.

    Attributes:
        weights: of the model, updates included.
        trained: those of them with a gradient.
        largest: of the largest parameter.
        largest_trained: of the largest one with a gradient.
        teacher: weights of a teacher that is there while the student learns, 0 without one.
        storing: weights of a teacher that stores its predictions before, 0 without one.
        passes: of a micro-batch, forward and backward.
        teaching: bytes of the teacher's forward pass, and of choosing its largest predictions where those are stored.
        logits: bytes of the teacher's predictions, which are there while the student learns.
        itemsize: bytes of a weight in training.
        tower: elements of the vision tower and the projector, which every process has whole; 0 without images.
        teacher_tower: those of the teacher, live or storing.
        pixels: bytes of what the model is given of a micro-batch's images.
        seeing: operations of the towers for a micro-batch, as far as they run while the student learns.
    """

    weights: int
    trained: int
    largest: int
    largest_trained: int
    teacher: int
    storing: int
    passes: Passes
    teaching: int
    logits: int
    itemsize: int
    tower: int = 0
    teacher_tower: int = 0
    pixels: int = 0
    seeing: int = 0


@dataclass(frozen=True)
class Stage:
    """A way to share a training out.

    Attributes:
        zero: stage of ZeRO.
        offload: optimizer states, and under stage 3 weights, are in the host's memory.
        processes: that share it.
        accumulated: micro-batches of a step in each.
        gpu: passes run on GPUs, which have memory of their own.
    """

    zero: int
    offload: bool
    processes: int
    accumulated: int
    gpu: bool


@dataclass(frozen=True)
class Parts:
    """Bytes by part.

    Attributes:
        weights: of the model, this process's share and what is gathered of the others'.
        gradients: until the step has used them.
        optimizer: float32 weights and Adam's two moments.
        activations: kept from the forward for the backward pass.
        workspace: what a pass or the optimizer's step takes for a moment: logits, gradients on their way.
        teacher: its weights and its predictions.
        buckets: in which gradients travel.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    workspace: int = 0
    teacher: int = 0
    buckets: int = 0

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """Bytes of one process on its device, and in its host's memory. On CPUs all is on the device."""

    device: Parts
    host: Parts


_counted: dict[tuple[object, ...], Sizes] = {}  # of this process: a plan has many ways of the same sizes


def sizes_of(
    config: PretrainedConfig,
    targets: tuple[str, ...],
    teacher: PretrainedConfig | None,
    top: int | None,
    recipe: Learning,
    dtype: torch.dtype,
    rows: int,
    length: int,
    images: Images | None = None,
) -> Sizes:
    """Count a training's elements, and the memory of a micro-batch of full rows, on the meta device.

    Args:
        targets: paths of the linear maps that are trained, or whose zeros are kept.
        top: predictions of the teacher that are stored of each place; None if it is asked while the student learns.
        rows: of a micro-batch, of so many tokens (`length`) each.
        images: that the rows show; None without any.

    Raises:
        Uncounted: the model's code cannot run on the meta device.
    """
    learning = tuple(getattr(recipe, name) for name in ("full", "keep_sparsity", "lora_rank", "dropout", "recompute"))
    reentrant = recipe.recompute and recipe.zero == 3
    models = config.to_json_string(), teacher.to_json_string() if teacher else None
    key = (models, top, targets, learning, reentrant, dtype, rows, length, images and images.key)
    if key not in _counted:
        try:
            _counted[key] = _count(config, targets, teacher, top, recipe, dtype, rows, length, images)
        except (InputError, Uncounted):
            raise
        except Exception as error:  # code that looks at values fails in any way where there are none
            raise Uncounted(first_line(error)) from error
    return _counted[key]


def _count(
    config: PretrainedConfig,
    targets: tuple[str, ...],
    teacher: PretrainedConfig | None,
    top: int | None,
    recipe: Learning,
    dtype: torch.dtype,
    rows: int,
    length: int,
    images: Images | None,
) -> Sizes:
    model = empty_model(config, dtype, META).requires_grad_(False)
    take_apart(model)
    model.config.use_cache = False
    for _ in choose_trained(model, recipe, targets):
        pass
    of_row = images.of_row(images.model) if images else {}
    tower = tower_of(images.model, of_row) if images else None
    places, inputs = rows * (length - 1), meta_inputs(rows, length)
    if images and tower and of_row:  # tokens that stand for images are not predicted
        places = rows * (length - max(1, tower.tokens))
        inputs = completed(images.model, inputs, of_row, tower.features)
    seeing = with_sight(images.model, model, dtype) if images else None
    student, batch = Student(model, seeing), meta_batch(inputs, places)
    parameters = list({id(parameter): parameter for parameter in student.parameters()}.values())
    trained = [parameter.numel() for parameter in parameters if parameter.requires_grad]
    distillation: Distillation | None = None
    taught = teaching = logits = 0
    other_tower: Tower | None = None
    if teacher is not None:
        other = empty_model(teacher, dtype, META).requires_grad_(False)
        take_apart(other)
        other.config.use_cache = False
        taught = sum(parameter.numel() for parameter in other.parameters())
        other_seeing = None
        if images and images.teacher:
            other_tower = tower_of(images.teacher, images.of_row(images.teacher))
            other_seeing = with_sight(images.teacher, other, dtype)
        if top is None:
            given = torch.empty(places, teacher.vocab_size, dtype=dtype, device=META)
            logits = given.numel() * dtype.itemsize
            teaching = count_forward(Teacher(other, other_seeing), batch, seeing=other_seeing)
            distillation = WholeDistillation(given, head_logits(teacher, "teacher"), temperature=2.0, weight=0.5)
        else:
            logits = places * bytes_per_prediction(top)
            chosen = partial(largest, made=head_logits(teacher, "teacher"), temperature=2.0, top=top)
            teaching = count_forward(Teacher(other, other_seeing), batch, chosen, other_seeing)
            tokens = torch.empty(places, top, dtype=TOKENS, device=META)
            chances = torch.empty(places, top + 1, dtype=STORED, device=META)
            distillation = TopDistillation(tokens, chances, temperature=2.0, weight=0.5)
    towers = (tower, other_tower if top is None else None)
    return Sizes(
        weights=sum(parameter.numel() for parameter in parameters),
        trained=sum(trained),
        largest=max(parameter.numel() for parameter in parameters),
        largest_trained=max(trained),
        teacher=taught if top is None else 0,
        storing=0 if top is None else taught,
        passes=count_passes(student, batch, distillation, seeing),
        teaching=teaching,
        logits=logits,
        itemsize=dtype.itemsize,
        tower=tower.parameters if tower else 0,
        teacher_tower=other_tower.parameters if other_tower else 0,
        pixels=rows * sum(tensor.nbytes for tensor in of_row.values()),
        seeing=sum(one.operations for one in towers if one) * rows,
    )


def memory_of_training(sizes: Sizes, stage: Stage) -> Memory:
    """Return what the process that takes most has at the moment of its most memory: in a pass, in the step, or where a
    teacher stores its predictions before the training."""
    kept, apart = _kept(sizes, stage), _offloaded(sizes, stage)
    growing, there = _gradients(sizes, stage)
    teaching, images = 0 if sizes.storing else sizes.teaching - sizes.logits, _images(sizes, stage)
    going = max(int(sizes.passes.peak(growing)), teaching)
    activations = min(sizes.passes.kept, going)
    before, after = int(there * sizes.trained), int((growing + there) * sizes.trained)
    in_pass = Parts(**kept, gradients=before, activations=activations, workspace=going - activations + images)
    in_step = Parts(**kept, gradients=after, workspace=_of_step(sizes, stage) + images)
    before_it, apart_before = _storing(sizes, stage)
    device = max(in_pass, in_step, before_it, key=lambda parts: parts.peak)
    if stage.gpu:
        return Memory(device, max(apart, apart_before, key=lambda parts: parts.peak))
    if device is before_it:
        return Memory(device, Parts())
    joined = {name: value + getattr(apart, name) for name, value in vars(device).items()}
    return Memory(Parts(**joined), Parts())


def _kept(sizes: Sizes, stage: Stage) -> dict[str, int]:
    """Return the bytes on the device that are there all the time, by part."""
    item, zero, count = sizes.itemsize, stage.zero, stage.processes
    share = count if zero == 3 else 1
    gathered = _gathered(sizes, stage, sizes.weights)
    here = not (zero == 3 and stage.offload and stage.gpu)  # not in the host's memory
    states = 3 if zero else 2  # float32 tensors of the size of the trained part
    return {
        "weights": item * (here * sizes.weights // share + gathered + sizes.tower),
        "optimizer": 0 if stage.offload else states * FLOAT32 * sizes.trained // (count if zero else 1),
        "teacher": _teacher(sizes, stage, sizes.teacher) + sizes.logits,
        "buckets": _buckets(sizes, stage),
    }


def _gathered(sizes: Sizes, stage: Stage, weights: int) -> int:
    """Return the elements that are gathered of the others' shares of a model."""
    # The student and the teacher are two engines to DeepSpeed, each with weights of its own that are gathered.
    return min(weights, LIVE + PREFETCHED + sizes.largest) if stage.zero == 3 and stage.processes > 1 else 0


def _teacher(sizes: Sizes, stage: Stage, weights: int) -> int:
    """Return the bytes of a teacher's weights on the device, its vision tower included."""
    if not weights:
        return 0
    share = stage.processes if stage.zero == 3 else 1
    here = not (stage.zero == 3 and stage.offload and stage.gpu)
    return sizes.itemsize * (here * weights // share + _gathered(sizes, stage, weights) + sizes.teacher_tower)


def _storing(sizes: Sizes, stage: Stage) -> tuple[Parts, Parts]:
    """Return what a teacher that stores its predictions has on the device and in the host's memory, without the
    student."""
    if not sizes.storing:
        return Parts(), Parts()
    host = stage.zero == 3 and stage.offload and stage.gpu
    apart = Parts(teacher=sizes.itemsize * sizes.storing // stage.processes if host else 0)
    return Parts(teacher=_teacher(sizes, stage, sizes.storing), workspace=sizes.teaching + _images(sizes, stage)), apart


def _images(sizes: Sizes, stage: Stage) -> int:
    """Return the bytes of images on the device: those in use, and on CPUs those of the next micro-batch beside them."""
    return sizes.pixels * (1 if stage.gpu else 2)


def _buckets(sizes: Sizes, stage: Stage) -> int:
    """Return the bytes of the buffers in which gradients travel. On CPUs pages that are not used take no memory."""
    if stage.zero == 0:
        return 0
    item = FLOAT32 if stage.zero == 1 else sizes.itemsize
    if not stage.gpu:
        return item * min(BUCKET, sizes.trained)
    return item * BUCKET * (2 if stage.zero == 2 else 1)


def _gradients(sizes: Sizes, stage: Stage) -> tuple[float, float]:
    """Return the bytes on the device, for each trained element, of gradients that come as a pass goes back, and of
    those that are there before, from earlier micro-batches or as a buffer."""
    several = stage.accumulated > 1
    if stage.zero == 0:
        return (0, FLOAT32) if several else (FLOAT32, 0)
    if stage.zero == 1:  # added up in float32, and not shared out until all are there
        added = FLOAT32 if sizes.itemsize < FLOAT32 else 0
        return (0, sizes.itemsize + added) if several else (sizes.itemsize + added, 0)
    if stage.offload:
        return 0, 0
    share = FLOAT32 / stage.processes
    if stage.zero == 2:
        return share, share if several else 0
    return 0, share


def _of_step(sizes: Sizes, stage: Stage) -> int:
    """Return the bytes that are taken for a moment when all gradients are there: they are sent, and the optimizer
    uses them."""
    sent = min(BUCKET, sizes.trained)
    share = sizes.trained // stage.processes
    if stage.zero == 0:
        return FLOAT32 * sent
    if stage.zero == 3:  # a bucket is arranged anew, and what comes back is another tensor
        return max(sizes.itemsize * (sent + sent // stage.processes), FLOAT32 * min(share, SUBGROUP))
    return 2 * FLOAT32 * sizes.largest_trained  # the norm is taken in float64


def _offloaded(sizes: Sizes, stage: Stage) -> Parts:
    """Return the bytes in the host's memory: float32 weights, their gradients and moments, and stage 3's weights."""
    if not stage.offload:
        return Parts()
    share = sizes.trained // stage.processes
    weights = teacher = 0
    if stage.zero == 3 and stage.gpu:
        weights, teacher = (sizes.itemsize * count // stage.processes for count in (sizes.weights, sizes.teacher))
    copies = 2 if stage.accumulated > 1 or stage.zero == 3 else 1  # of gradients: as they come, and added up
    return Parts(weights=weights, teacher=teacher, gradients=copies * FLOAT32 * share, optimizer=3 * FLOAT32 * share)
