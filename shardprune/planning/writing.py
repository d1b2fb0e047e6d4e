"""The calibration text that a model writes before a run: where layers and what they keep are, how long it takes.

docs/planning.md has the formulae.
"""

from dataclasses import dataclass

import torch

from shardprune.cluster.generation import layout_of_writing, rounds_of
from shardprune.cluster.layout import Layout
from shardprune.model.draft import DROPPED, Kept, kept_by
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import check_class_writes
from shardprune.planning.choosing import Candidate
from shardprune.planning.costs import KERNELS
from shardprune.planning.hardware import CALL_SECONDS, KERNEL_SECONDS
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import Task
from shardprune.recipes.groups import batch_of
from shardprune.shard.generation_worker import HELD_LAYERS, SAMPLING_BYTES, Room
from shardprune.storage.mixture import windows_of
from shardprune.storage.quantities import gigabytes


@dataclass(frozen=True)
class Writing:
    """How a text of `sequences` is written: in batches of `batch`, by workers of `layout` that have `room` for whole
    batches beside `held` bytes of weights and of what sampling takes. `smaller` is the largest batch with which layers
    would stay in memory that do not."""

    sequences: int
    length: int
    batch: int
    layout: Layout
    held: int
    room: Room
    seconds: float
    smaller: int | None

    @property
    def fits(self) -> bool:
        """Whether every worker has room for one batch."""
        return self.room.batches > 0

    @property
    def missing(self) -> str:
        """What is missing where it does not fit, and what helps."""
        kept, room = gigabytes(self.room.batch_bytes), gigabytes(self.room.bytes)
        return (
            f"writing calibration text, a batch of {self.batch} sequences: keys, values and states {kept} beside "
            f"{gigabytes(self.held)}, but a worker has room for {room}"
        )


def writing_of(recipe: PlanRecipe, candidate: Candidate) -> Writing | None:
    """Return how the text of a recipe is written on the workers of a candidate; None where the model writes none.

    Raises:
        InputError: models of its class do not write.
    """
    sequences = sum(
        count
        for part, count in zip(recipe.parts, windows_of(recipe.parts, recipe.samples), strict=True)
        if part.is_written
    )
    if not sequences:
        return None
    task, setup, row = candidate.task, candidate.setup, candidate.row
    model, length = task.model, recipe.seqlen + DROPPED + recipe.self_bos
    check_class_writes(model.skeleton.config)
    dtype = _dtype_of(task)
    kept_by_layer = _kept_by_layer(task, dtype)
    of_model = sum(kept_by_layer, Kept()).bytes_of(recipe.seqlen, dtype)
    batch = min(sequences, batch_of(recipe.self_batch, of_model // dtype.itemsize))
    batches = [range(start, min(start + batch, sequences)) for start in range(0, sequences, batch)]
    layout = layout_of_writing(setup.layout, setup.streamed, len(batches))
    longest = max(len(shard) for shard in layout.shards)
    # The first shard has the embedding and the last one the head, which may be one worker and one tensor.
    alone = len(layout.shards) == 1
    frame = model.embedding + model.head * (not model.tied) if alone else max(model.embedding, model.head)
    by_shard = [sum((kept_by_layer[index] for index in shard), Kept()) for shard in layout.shards]
    most = max(by_shard, key=lambda kept: kept.bytes_of(length, dtype))
    kept = most.bytes_of(length, dtype)  # of one sequence
    there = candidate.device_room if setup.gpu else row.host

    def held(layers: int, size: int) -> int:
        return (layers * model.layer + frame) * task.itemsize + SAMPLING_BYTES * size * model.vocabulary

    smaller = [size for size in range(batch, 0, -1) if held(longest, size) + size * kept <= there]
    resident = not setup.streamed or smaller[:1] == [batch]
    weights = held(longest if resident else min(longest, HELD_LAYERS), batch)
    room = Room(resident, max(0, there - weights) // (batch * kept), batch * kept, there)
    seconds = _seconds(candidate, layout, room, batches, longest, length, batch * most.states) if room.batches else 0.0
    return Writing(
        sequences, length, batch, layout, weights, room, seconds, None if resident or not smaller else smaller[0]
    )


def _dtype_of(task: Task) -> torch.dtype:
    """Return the dtype in which a task computes."""
    stored = task.model.stored
    return stored if task.itemsize == stored.itemsize else torch.float32


def _kept_by_layer(task: Task, dtype: torch.dtype) -> list[Kept]:
    """Return what each layer of a task's model keeps, as the workers will find it."""
    skeleton = task.model.skeleton
    found = kept_by(skeleton, range(skeleton.layers))
    if skeleton.dtype == dtype or not any(kept.states for kept in found):
        return found
    return kept_by(Skeleton(skeleton.config, "cpu", dtype), range(skeleton.layers))  # states differ by dtypes


def _seconds(
    candidate: Candidate, layout: Layout, room: Room, batches: list[range], longest: int, length: int, states: int
) -> float:
    """Return the seconds of writing.

    A token of a batch reads the weights of every layer and, at half of the sequence's length, half of its keys and
    values; it reads and writes the `states` of a batch, in bytes. The waves of a round keep the shards busy where there
    are as many.
    """
    task, row, costs = candidate.task, candidate.row, candidate.runs[0]
    model = task.model
    touched = longest * model.layer * task.itemsize + (room.batch_bytes - states) / 2 + 2 * states
    batch = touched / row.memory + longest * KERNELS * (KERNEL_SECONDS if row.gpu else 0.0)
    operations = 2 * len(batches[0]) * longest * model.shape.multiplied
    batch = max(batch, operations / (row.products if task.itemsize == 2 or not row.gpu else row.float32))
    head = (model.head * task.itemsize + SAMPLING_BYTES * len(batches[0]) * model.vocabulary) / row.memory
    reading = 0.0 if room.resident else longest * costs.read(model.layer)
    shards, total = len(layout.shards), 0.0
    for waves in rounds_of(batches, layout, room):
        size = -(-(waves[0][2] - waves[0][1]) // len(batches[0]))
        one = max(size * batch, reading)
        side_by_side = -(-len(waves) // layout.replicas)
        through = shards * (one + CALL_SECONDS) + size * head
        total += (length - 1) * max(side_by_side * (one + size * head / shards + CALL_SECONDS), through)
    return total
