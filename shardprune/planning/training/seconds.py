"""Operations, traffic and seconds of a training's step."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise

from shardprune.model.skeleton import Skeleton
from shardprune.planning.hardware import HARDWARE, Hardware
from shardprune.planning.training.memory import FLOAT32, Sizes, Stage
from shardprune.planning.training.recipe import TrainingPlanRecipe


@dataclass(frozen=True)
class Work:
    """A step of all processes.

    Attributes:
        tokens: of a step whose rows are all full.
        operations: multiplications and additions of all processes.
        between_processes: bytes that one process sends.
        to_host: bytes that one process moves between its device and its host, both ways.
        seconds: expected of a step; sending goes on beside the passes, and the longer of the two counts.
    """

    tokens: int
    operations: int
    between_processes: int
    to_host: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def work_of(
    recipe: TrainingPlanRecipe,
    row: Hardware,
    skeleton: Skeleton,
    teacher: Skeleton | None,
    sizes: Sizes,
    stage: Stage,
    recompute: bool,
) -> Work:
    """Return the work of a step of a training, with the forward passes of a teacher and of vision towers if there are
    any."""
    tokens = recipe.batch * recipe.length
    operations = tokens * _operations_per_token(recipe, skeleton, teacher, recompute)
    operations += sizes.seeing * stage.processes * stage.accumulated  # forward only: what sees images is frozen
    sent = _sent(sizes, stage, recompute)
    moved = _moved(sizes, stage)
    rate = row.products if recipe.bf16 or not row.gpu else row.large
    passes = operations / (stage.processes * rate)
    crossing = recipe.nodes > 1 and stage.processes > recipe.gpus
    # In a ring each process sends all bytes to the next one, and one of a node's to another node.
    link = min(row.peer, row.network) if crossing else row.peer
    # The optimizer reads and writes weights, gradients and moments once, beside the weights of the passes.
    share = sizes.trained / (stage.processes if stage.zero else 1)
    optimizer = 7 * FLOAT32 * share / (row.memory if not stage.offload else row.memory / 10)
    return Work(
        tokens=tokens,
        operations=operations,
        between_processes=sent,
        to_host=moved,
        seconds=max(passes, sent / link) + moved / row.link + optimizer,
    )


def _operations_per_token(
    recipe: TrainingPlanRecipe, skeleton: Skeleton, teacher: Skeleton | None, recompute: bool
) -> int:
    """Return the operations for a token of a full row, the teacher's and those that are done again included."""
    forward = forward_operations(skeleton, recipe.length)
    teaching = forward_operations(teacher, recipe.length) if teacher else 0
    learning = operations_of_model(skeleton, recipe.length, recipe.full, recipe.keep_sparsity)
    return learning + recompute * forward + teaching


def operations_of_model(skeleton: Skeleton, length: int, full: bool, masked: bool) -> int:
    """Return the operations for a token of a training's forward and backward pass.

    Back through frozen weights there is one product for the inputs, through those that are trained another one; the
    gradient of a masked update has the weight's size.
    """
    return forward_operations(skeleton, length) * (3 if full or masked else 2)


def forward_operations(skeleton: Skeleton, length: int) -> int:
    """Return the operations for a token of a forward pass: two for each weight that it is multiplied with."""
    embedding = skeleton.model.get_input_embeddings().weight
    looked_up = 0 if embedding is skeleton.model.get_output_embeddings().weight else embedding.numel()
    return 2 * (skeleton.parameters() - looked_up - _passed_by(skeleton)) + 2 * _attention(skeleton, length)


def _passed_by(skeleton: Skeleton) -> int:
    """Return the number of weights of experts, and of layers that do not run, that a token does not pass through."""
    passed = 0.0
    for index, kind in enumerate(skeleton.family.kinds):
        if not kind.runs:
            passed += sum(math.prod(shape) for shape in skeleton.layer_tensors(index).values())
        for name in (name for names in kind.maps for name in names if kind.mixture_of(name)):
            passed += math.prod(skeleton.map_shape(index, name)) * (1 - kind.share_of_tokens(name))
    return round(passed)


def _attention(skeleton: Skeleton, length: int) -> int:
    """Return the multiplications for a token of causal attention, those of scores and of values."""
    return sum(kind.runs for kind in skeleton.family.kinds) * length * skeleton.config.hidden_size


def rate_of_gpu(name: str, bf16: bool) -> float | None:
    """Return the operations per second of a GPU's products by its vendor's name; None where it is not known."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    known = {*words, *(first + second for first, second in pairwise(words))}
    found = [row for row in HARDWARE.values() if row.gpu and row.name in known]
    return (found[0].products if bf16 else found[0].float32) if found else None


def _sent(sizes: Sizes, stage: Stage, recompute: bool) -> int:
    """Return the bytes that one process sends in a step: gradients in rings, and gathered weights."""
    others = (stage.processes - 1) / stage.processes
    gradients = sizes.itemsize * sizes.trained
    if stage.zero < 2:
        item = FLOAT32 if stage.zero else sizes.itemsize
        return int(2 * others * item * sizes.trained)
    if stage.zero == 2:  # gradients of every micro-batch, and the weights that were changed
        return int(others * gradients * (stage.accumulated + 1))
    gathers = (3 if recompute else 2) * sizes.weights + sizes.teacher
    return int(others * (sizes.itemsize * gathers + gradients) * stage.accumulated)


def _moved(sizes: Sizes, stage: Stage) -> int:
    """Return the bytes that one process moves between its device and the host."""
    if not stage.offload or not stage.gpu:
        return 0
    share = sizes.trained // stage.processes
    # Stage 3's weights come from there for the forward and for the backward pass, a teacher's for the forward pass.
    read = (2 * sizes.weights + sizes.teacher) // stage.processes * stage.accumulated if stage.zero == 3 else 0
    weights = sizes.itemsize * read
    return 2 * sizes.itemsize * share + weights
