"""One process of a training run under DeepSpeed: the model, the loop over steps, checkpoints and the loss log."""

import gc
import io
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from shardprune.errors import InputError, TrainingError
from shardprune.model.checkpoint import reopened
from shardprune.recovery.batches import Batches, MicroBatch
from shardprune.recovery.best import Best
from shardprune.recovery.checkpoints import Checkpoints
from shardprune.recovery.experts import keep_from_deepspeed
from shardprune.recovery.loss_log import Loss, Losses
from shardprune.recovery.model import load_model, load_seeing
from shardprune.recovery.operations import load_from_cache
from shardprune.recovery.packed_attention import attend_by_example
from shardprune.recovery.partitioning import Partitioning, forget_modules, release
from shardprune.recovery.parts import PartClock
from shardprune.recovery.predictions import PredictionBatch, Reading, ahead
from shardprune.recovery.rows import Rows
from shardprune.recovery.schedule import learning_rate
from shardprune.recovery.spec import HELD_OUT, ROWS, TrainingSpec
from shardprune.recovery.student import Student
from shardprune.recovery.teacher_store import TeacherStore
from shardprune.recovery.teaching import LiveTeacher, StoredTeacher, Teaching, store_predictions
from shardprune.recovery.trained import choose_trained
from shardprune.shard.memory import peak_bytes
from shardprune.storage.folder import Folder

# DeepSpeed calls collectives by names that torch is about to change.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


class Training:
    """One process's part of a training run. All processes make the same calls at the same time.

    Raises:
        InputError: an input that the driver has checked is gone.
    """

    def __init__(self, spec: TrainingSpec, device: torch.device) -> None:
        load_from_cache(spec.recipe.state, spec.recipe.device)
        with redirect_stdout(io.StringIO()):  # it prints about operations that it has loaded
            deepspeed.init_distributed()  # uses torch's existing default group
        self.spec, self.device = spec, device
        self.recipe = recipe = spec.recipe
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        state = Folder(recipe.state, "state")
        rows = Rows.load(state, ROWS)
        self.batches = Batches(rows, recipe.batch, recipe.micro_batch, recipe.seed, spec.mixture)
        self.held_out = Rows.load(state, HELD_OUT) if recipe.held_out else None
        self.losses = Losses(recipe.state)
        self.checkpoints = Checkpoints(recipe.state, trained_only=not recipe.full, keep_best=recipe.best)
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        partitioning = Partitioning(spec.config) if recipe.zero == 3 else None
        begun = time.monotonic()
        self.teacher = self._start_teacher(dtype, partitioning)
        self.teacher_seconds = time.monotonic() - begun
        checkpoint = reopened(recipe.model, spec.inputs["model"])
        self.model = load_model(checkpoint, device, dtype, partitioning)
        self.reading = Reading.of(checkpoint, rows, self.held_out)
        if self.reading.bounds:
            attend_by_example(self.model, device)
        for module in choose_trained(self.model, recipe, spec.targets):
            if partitioning is not None:
                partitioning.partition(module)
        keep_from_deepspeed(self.model)
        self.seeing = load_seeing(checkpoint, self.model, device, dtype) if self.reading.processor else None
        self.engine = self._start_engine(Student(self.model, self.seeing))

    def run(self) -> PreTrainedModel:
        """Train from the last checkpoint, or from the start.

        Returns:
            The model after the last step, or with the lowest held-out loss where the recipe asks for that.
        """
        recipe, spec = self.recipe, self.spec
        start, best = self.checkpoints.load(self.engine)
        if self.rank == 0:
            self.losses.mend()
        rows = (micro.rows for step in range(start, spec.steps) for micro in self._micro_batches(step))
        with closing(ahead(self.batches.rows, rows, self.reading, self.device)) as upcoming:
            for step in range(start, spec.steps):
                if self._stops(best):
                    break  # of a run that resumes when it had stopped
                loss = self._step(step, upcoming)
                done, last = step + 1, step + 1 == spec.steps
                measured = self.held_out is not None and (last or done % recipe.evaluate_every == 0)
                begun = time.monotonic()
                held_out = self._mean_held_out() if measured else None
                if held_out is not None:
                    best = best.after(done, held_out)
                    loss["parts"]["held_out"] = round(time.monotonic() - begun, 6)
                record = Loss(step=done, **loss, held_out=held_out)
                self._log(record)
                lowest = recipe.best and best.step == done
                if last or lowest or self._stops(best) or done % recipe.checkpoint_every == 0:
                    begun = time.monotonic()
                    self.checkpoints.save(self.engine, done, best)
                    loss["parts"]["checkpoint"] = round(time.monotonic() - begun, 6)
                    self._log(record)  # again: of several records of a step the last one counts
        if recipe.best and best.since:  # the last step is measured too
            self.checkpoints.load_best(self.engine, best)
        return self.model

    def leave(self) -> None:
        """Take everything out of memory: hooks of autograd, and DeepSpeed's stack of modules, hold engines on."""
        self.engine.destroy()
        if self.recipe.zero == 3:  # of which something in DeepSpeed keeps the engine for good
            release(self.engine.module)
            if self.seeing is not None:
                release(self.seeing)
            optimizer, self.engine.optimizer = self.engine.optimizer, None
            optimizer.optimizer.state.clear()
            optimizer.optimizer.param_groups.clear()
            vars(optimizer).clear()
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.leave()
        forget_modules()
        del self.engine, self.model, self.seeing, self.teacher
        gc.collect()  # an engine is a reference cycle

    def _log(self, record: Loss) -> None:
        if self.rank == 0:
            self.losses.append(record)

    def _stops(self, best: Best) -> bool:
        """Return whether the training ends early, by its lowest held-out loss so far."""
        return self.recipe.early_stopping is not None and best.since >= self.recipe.early_stopping

    # -- the parts --------------------------------------------------------------------------------------------

    def _start_teacher(self, dtype: torch.dtype, partitioning: Partitioning | None) -> Teaching | None:
        """Return the teacher, if there is one. Where its predictions are stored, it is not in memory afterwards."""
        recipe, spec, device = self.recipe, self.spec, self.device
        if recipe.teacher is None:
            return None
        load = partial(LiveTeacher, spec, self.batches.rows, device, dtype, partitioning)
        if recipe.teacher_top is None:
            return load()
        used = self.batches.used(spec.steps)
        store = TeacherStore(Folder(recipe.state, "state"), self.batches.rows, used, recipe.teacher_top)
        store_predictions(store, load, spec, device)
        return StoredTeacher(store, spec, device)

    def _start_engine(self, student: Student) -> deepspeed.DeepSpeedEngine:
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        try:
            with redirect_stdout(io.StringIO()):  # stage 1 prints about memory
                return deepspeed.initialize(model=student, model_parameters=trained, config=self.spec.config)[0]
        except Exception as error:  # DeepSpeed checks settings in many ways, each with an error of its own
            if self.recipe.deepspeed is None:
                raise
            reason = " ".join(str(error).split())
            raise InputError("deepspeed", f"{self.recipe.deepspeed!r} does not work: {reason}") from error

    # -- a step ---------------------------------------------------------------------------------------------------

    def _step(self, step: int, upcoming: Iterator[PredictionBatch]) -> dict[str, Any]:
        """Run one step over all processes; return its record for the loss log.

        Args:
            upcoming: the micro-batches of this step and later ones.
        """
        recipe, started, clock = self.recipe, time.monotonic(), PartClock(self.device)
        rate = learning_rate(step, self.spec.steps, recipe.highest_rate, recipe.warmup, recipe.schedule)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        targets = self.batches.targets(step)
        # DeepSpeed averages over micro-batches and processes, but their numbers of targets differ: scale the loss.
        scale = self.processes * self.engine.gradient_accumulation_steps() / targets
        # On the device: it works on one micro-batch after another, and the host waits for it once a step.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.train()
        for micro in self._micro_batches(step):
            torch.manual_seed(micro.seed)  # of dropout: the same on any process
            with clock.part("data"):
                batch = next(upcoming)
            distillation = None
            if self.teacher is not None:
                with clock.part("teacher"):
                    distillation = self.teacher(batch, micro.rows)
            with clock.part("forward"):
                loss = self.engine(batch, distillation)
            del distillation
            with clock.part("backward"):
                self.engine.backward(loss * scale)
            with clock.part("step"):
                self.engine.step()
            total += loss.detach()
        mean = self._summed(total) / targets
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not (math.isfinite(mean) and math.isfinite(norm)) or self.engine.skipped_steps:
            raise TrainingError(
                f"step {step + 1}: the loss is {mean:g} and its gradient's norm {norm:g}; use a lower learning rate"
            )
        return {
            "loss": mean,
            "learning_rate": rate,
            "gradient_norm": norm,
            "targets": targets,
            "tokens": self.batches.tokens(step),
            "seconds": round(time.monotonic() - started, 6),
            "peak_bytes": peak_bytes(self.device),
            "parts": clock.seconds(),
        }

    def _micro_batches(self, step: int) -> Iterator[MicroBatch]:
        return self.batches.of(step, self.rank, self.processes)

    @torch.no_grad()
    def _mean_held_out(self) -> float:
        """Return the mean loss of the held-out rows' targets, without the teacher."""
        rows = self.held_out
        assert rows is not None
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        micro = self.batches.micro
        # Every process runs as many passes: under ZeRO-3 each gathers weights from all.
        firsts = [first + self.rank * micro for first in range(0, len(rows), micro * self.processes)]
        chosen = [range(first, min(first + micro, len(rows))) or range(1) for first in firsts]
        for first, batch in zip(firsts, ahead(rows, chosen, self.reading, self.device), strict=True):
            loss = self.engine(batch)
            if first < len(rows):
                total += loss
        return self._summed(total) / rows.targets(range(len(rows)))

    def _summed(self, value: Tensor) -> float:
        """Sum a number over all processes; the host waits for the device."""
        dist.all_reduce(value)
        return float(value)
