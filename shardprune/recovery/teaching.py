"""A teacher in a training run: live beside the student, or as the largest of its predictions, stored before."""

import gc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from shardprune.errors import TrainingError
from shardprune.model.checkpoint import reopened
from shardprune.model.head_logits import head_logits
from shardprune.recovery.checkpoints import broadcast_from_rank_zero
from shardprune.recovery.distillation import Distillation, TopDistillation, WholeDistillation, largest
from shardprune.recovery.model import load_model, load_seeing
from shardprune.recovery.packed_attention import attend_by_example
from shardprune.recovery.partitioning import Partitioning, release
from shardprune.recovery.predictions import PredictionBatch, Reading, ahead
from shardprune.recovery.rows import Rows
from shardprune.recovery.spec import TrainingSpec
from shardprune.recovery.student import Teacher
from shardprune.recovery.teacher_store import TeacherStore


class Teaching(Protocol):
    """A teacher's part in the loss of a batch on the device, made of so many rows."""

    def __call__(self, batch: PredictionBatch, rows: Sequence[int]) -> Distillation: ...


class LiveTeacher:
    """A teacher whose weights are in memory. All processes use it at the same time.

    Args:
        rows: that it predicts for.
        partitioning: if ZeRO-3 shares the teacher out, too.

    Raises:
        InputError: the teacher that the driver has checked is gone.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        rows: Rows,
        device: torch.device,
        dtype: torch.dtype,
        partitioning: Partitioning | None,
    ) -> None:
        recipe = spec.recipe
        assert recipe.teacher is not None
        checkpoint = reopened(recipe.teacher, spec.inputs["teacher"], "teacher")
        model = load_model(checkpoint, device, dtype, partitioning)
        self.reading, self.made = Reading.of(checkpoint, rows), head_logits(model.config, "teacher")
        if self.reading.bounds:
            attend_by_example(model, device)
        self._recipe = recipe
        self._seeing = load_seeing(checkpoint, model, device, dtype) if self.reading.processor else None
        self._model: Callable[[PredictionBatch], Tensor] = Teacher(model, self._seeing).eval().requires_grad_(False)
        self._engine: Any = None
        if partitioning is not None:
            config = {key: value for key, value in spec.config.items() if key != "optimizer"}
            self._model = self._engine = deepspeed.initialize(model=self._model, config=config)[0]

    @torch.no_grad()
    def outputs(self, batch: PredictionBatch) -> Tensor:
        """Return the outputs of the head for a batch [predictions, vocabulary]."""
        return self._model(batch)

    def __call__(self, batch: PredictionBatch, rows: Sequence[int]) -> Distillation:
        recipe = self._recipe
        return WholeDistillation(self.outputs(batch), self.made, recipe.temperature, recipe.teacher_weight)

    def leave(self) -> None:
        """Take the teacher out of memory."""
        if self._engine is not None:
            self._engine.destroy()
            release(self._engine.module)
            if self._seeing is not None:
                release(self._seeing)
        del self._model, self._engine, self._seeing
        gc.collect()  # an engine is a reference cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class StoredTeacher:
    """A teacher whose largest predictions are stored."""

    def __init__(self, store: TeacherStore, spec: TrainingSpec, device: torch.device) -> None:
        self._store, self._recipe, self._device = store, spec.recipe, device

    def __call__(self, batch: PredictionBatch, rows: Sequence[int]) -> Distillation:
        recipe = self._recipe
        tokens, chances = (tensor.to(self._device) for tensor in self._store.read(rows))
        return TopDistillation(tokens, chances, recipe.temperature, recipe.teacher_weight)


def store_predictions(
    store: TeacherStore, load: Callable[[], LiveTeacher], spec: TrainingSpec, device: torch.device
) -> None:
    """Compute and write the parts of a store that are missing. All processes call together, and share the parts.

    Args:
        load: the teacher, which is loaded only if something is missing, and taken out of memory again.

    Raises:
        TrainingError: predictions of the teacher are not finite.
    """
    # Rank 0 alone looks: on shared storage other nodes may see new files later.
    missing = broadcast_from_rank_zero(store.missing if dist.get_rank() == 0 else None)
    if missing:
        teacher = load()
        _fill(store, missing, teacher, spec, device)
        teacher.leave()
    dist.barrier()  # all parts are there


def _fill(
    store: TeacherStore, missing: Sequence[int], teacher: LiveTeacher, spec: TrainingSpec, device: torch.device
) -> None:
    recipe, rank, processes = spec.recipe, dist.get_rank(), dist.get_world_size()
    shares = [
        [(part, rows) for part in missing[first::processes] for rows in store.batches(part, recipe.micro_batch)]
        for first in range(processes)
    ]
    own = shares[rank]
    # Every process runs as many passes: under ZeRO-3 each gathers weights from all.
    idle = max(map(len, shares)) - len(own)
    batches = ahead(store.rows, [*(rows for _, rows in own), *[range(1)] * idle], teacher.reading, device)
    found: list[tuple[Tensor, Tensor]] = []
    for place, batch in enumerate(batches):
        outputs = teacher.outputs(batch)
        if place >= len(own):
            continue
        part, rows = own[place]
        tokens, chances = largest(outputs, teacher.made, recipe.temperature, store.top)
        if not bool(torch.isfinite(chances).all()):
            raise TrainingError(f"the teacher's predictions of rows {rows[0]} to {rows[-1]} are not finite")
        found.append((tokens.cpu(), chances.cpu()))
        if place + 1 == len(own) or own[place + 1][0] != part:
            tokens, chances = (torch.cat(tensors) for tensors in zip(*found, strict=True))
            store.write(part, tokens, chances)
            found = []
