"""The story of `shardprune recover`."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend
from shardprune.cluster.restarts import Attempts
from shardprune.commands.check_recovery import CLAIM, claim_of
from shardprune.commands.prepare_recovery import PreparedRecovery, is_sparse, prepare_recovery
from shardprune.commands.pushing import pushed
from shardprune.commands.state import RunState, When, costs_of_measuring
from shardprune.commands.tracking import Follow, tracked
from shardprune.errors import InputError, first_line, without_credentials
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.saving import write_frame, write_index
from shardprune.planning.training.seconds import operations_of_model, rate_of_gpu
from shardprune.recipes.evaluate import ShardFields
from shardprune.recipes.groups import BackendFields
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recovery.batches import Processes
from shardprune.recovery.best import best_of
from shardprune.recovery.loss_log import Losses, own_parts, parts_of
from shardprune.recovery.operations import build_what_is_used
from shardprune.recovery.spec import HELD_OUT, ROWS
from shardprune.report.achieved import sparsity_of, zeros_of
from shardprune.report.clock import Clock
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import ModelSize, Recovery, Result, Throughput, TrainingLoss, WorkerResult
from shardprune.storage.folder import Folder
from shardprune.storage.quantities import gigabytes
from shardprune.storage.records import LayerRecord

POLL_SECONDS = 1.0  # between two looks at the loss log of a training run


@pushed
def recover(recipe: RecoverRecipe, reporter: Reporter | None = None) -> Result:
    """Fine-tune a pruned model as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same training unfinished, it goes on from its last checkpoint.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    clock = Clock(reporter.events)
    with closing(backend_of(recipe)) as backend:
        result = fine_tuned(recipe, backend, reporter, clock)
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


def fine_tuned(recipe: RecoverRecipe, backend: Backend, reporter: Reporter, clock: Clock) -> Result:
    """Fine-tune a model on a backend; what `recover` does, but for the report."""
    with clock.phase("plan"):
        prepared = prepare_recovery(recipe, backend)
    run = RecoveryRun(prepared, backend, reporter, clock)
    result = run.state.done(reporter, run.is_trained) or run.go()
    run.remove_checkpoints()
    return result


class RecoveryRun:
    """One training run over as many attempts as it takes."""

    def __init__(self, prepared: PreparedRecovery, backend: Backend, reporter: Reporter, clock: Clock) -> None:
        self.prepared, self.backend, self.reporter, self.clock = prepared, backend, reporter, clock
        self.recipe, self.journal = prepared.recipe, prepared.journal
        evaluations = prepared.inputs.evaluations
        inputs = prepared.inputs.checkpoints
        self.state = RunState(prepared.journal, prepared.earlier, prepared.recipe.record(), evaluations, inputs)
        self.state.known.zeros = prepared.zeros
        self.training = prepared.recipe.state  # directory of the training's state
        self.losses = Losses(self.training)

    def go(self) -> Result:
        """Carry out the run in its output, and return its result."""
        with self.state.running(self.reporter, command=self.recipe.command), self._tracked() as report:
            self._measure("before", self.recipe.model)
            if self.state.previous is None:
                self._say_what_is_lost()
                self._say_what_is_mixed()
                self._say_what_is_stored()
                if self.state.resumed:
                    self.journal.remove_damaged(self.reporter.say)
                if not self._trained():
                    self._train(report)
                self._write_rest()
            self._measure("after", self.recipe.out)
            return self._finish()

    def remove_checkpoints(self) -> None:
        """Remove the training's state, of which nothing is needed any more, if it is this training's: where this one
        was finished before, the recipe may name any directory. A link stays, and what it leads to is emptied."""
        if not os.path.isdir(self.training) or not self._is_claimed():
            return
        linked = os.path.islink(self.training)
        try:
            for path in Path(self.training).iterdir() if linked else [Path(self.training)]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            self.reporter.say(f"{self.training} could not be removed: {first_line(error)}")

    def _is_claimed(self) -> bool:
        """Whether the training's state says that it is this training's."""
        try:
            return claim_of(self.training) == self.prepared.claim
        except InputError:  # what is there cannot be read
            return False

    # -- the steps ----------------------------------------------------------------------------------------------

    def is_trained(self, file: str) -> bool:
        """Return whether a file of the output comes from the training, which cannot be made again."""
        frame = {self.journal.frame_file} if self.recipe.full else set()
        return file in frame | {self.journal.layer_file(layer) for layer in range(self.journal.layers)}

    def _tracked(self) -> AbstractContextManager[Follow]:
        """Open the tracker, if there is one and something to train, before anything is measured: it may refuse."""
        if self.state.previous is not None:
            return nullcontext(lambda known: None)
        return tracked(self.recipe, self.journal.fingerprint, self.losses, self.reporter)

    def _train(self, report: Follow) -> None:
        """Train all layers, in as many attempts as it takes."""
        prepared = self.prepared
        self._share_inputs()
        if self.recipe.device == "cpu":  # on GPUs, which other machines have, each worker does
            build_what_is_used(self.recipe.offload, self.training, self.reporter.say)
        room = min(self.backend.room(self.recipe.device), prepared.processes.count)
        for attempt in self._attempts(prepared.processes.shrunk_to(int(room))):
            with attempt as processes, self.clock.phase("recover"), self._progress(report):
                self.state.known.workers = self.backend.train(prepared.spec(processes), processes.count)
        self._say_how_it_ended()
        self.state.save()

    def _trained(self) -> bool:
        """Whether all layers are trained and written."""
        frame = self.journal.folder.is_file(self.journal.frame_file) or not self.recipe.full
        return frame and len(self.journal.finished()) == self.prepared.skeleton.layers

    def _share_inputs(self) -> None:
        """Put what the processes read where all of them see it."""
        folder, inputs = Folder(self.training, "state"), self.prepared.inputs
        folder.write_text(CLAIM, self.prepared.claim)
        folder.remove_partial()
        inputs.rows.save(folder, ROWS)
        if len(inputs.held_out):
            inputs.held_out.save(folder, HELD_OUT)

    def _attempts(self, processes: Processes) -> Attempts[Processes]:
        """Return attempts with the processes that there are, until one ends without losing any."""
        device, restarts = self.recipe.device, self.recipe.max_restarts
        return Attempts(processes, device, restarts, self.backend, self.reporter, self.state.lost)

    def _write_rest(self) -> None:
        """Write what makes the layer files a checkpoint."""
        inputs = self.prepared.inputs
        self.journal.folder.remove_partial()
        with self.clock.phase("write"):
            if not self.recipe.full:
                write_frame(inputs.checkpoint, inputs.skeleton, self.journal)
            write_index(inputs.checkpoint, self.journal, {})

    def _measure(self, when: When, model: str) -> None:
        """Measure perplexity on every source on which it is not known, over shards: one for each worker that trains."""
        missing = list(self.state.missing(when))
        if not missing:
            return
        recipe = self.recipe
        shared = recipe.model_dump(include=set(BackendFields.model_fields))
        room = self.backend.slots().workers(recipe.device)  # which may be less than the training had
        count = max(1, min(recipe.workers, self.prepared.skeleton.layers, room))
        shards = ShardFields(**shared, shards=count, replicas=1)
        with closing(ShardedModel(model, shards, self.backend, self.reporter)) as sharded:
            for source, windows in missing:
                with self.clock.phase("evaluate"):
                    value = sharded.perplexity(windows)
                self.state.keep(source, when, value)

    # -- what is said and kept -------------------------------------------------------------------------------------

    def _say_what_is_lost(self) -> None:
        zeros = self.prepared.zeros
        if zeros and is_sparse(zeros) and not self.recipe.keep_sparsity:
            share = zeros.count / zeros.weights
            self.reporter.say(
                f"{zeros.count:,} zeros ({share:.1%} of the projections' weights) will be lost; "
                "--keep-sparsity keeps them"
            )

    def _say_what_is_mixed(self) -> None:
        if mixture := self.prepared.inputs.mixture:
            shares = [
                f"{without_credentials(part.source)} {size:,} rows x {passes:.2g}"
                for part, size, passes in zip(self.recipe.parts, mixture.sizes, mixture.passes(), strict=True)
            ]
            self.reporter.say(f"an epoch of {sum(mixture.sizes):,} rows: {', '.join(shares)}")

    def _say_what_is_stored(self) -> None:
        if store := self.prepared.teacher_store:
            self.reporter.say(
                f"the teacher's {store.top} largest of {store.predictions:,} predictions take "
                f"{gigabytes(store.bytes)} in {self.training}"
            )

    def _say_how_it_ended(self) -> None:
        """Say that the training stopped early, and which weights are written if not the last ones."""
        losses, planned = self.losses.read(), self.prepared.steps
        best, last = best_of(losses), losses[-1].step
        if last < planned:
            self.reporter.say(f"stopped after step {last} of {planned}: no new lowest held-out loss in {best.since}")
        if self.recipe.best and best.step < last:
            self.reporter.say(f"written: step {best.step}, with the lowest held-out loss ({best.loss:.4f})")

    @contextmanager
    def _progress(self, report: Follow) -> Iterator[None]:
        """Show the steps of the training, and report them, while the block lasts."""
        over, store = threading.Event(), self.prepared.teacher_store
        with self.reporter.step("recover", self.prepared.steps) as step:

            def follow() -> None:
                while True:
                    last = over.wait(POLL_SECONDS)
                    losses = self.losses.read()
                    report(losses)
                    if store and not losses and not last:
                        step.describe(f"teacher {store.parts - len(store.missing())}/{store.parts}")
                    if losses and (loss := losses[-1]).step > step.done:
                        speed = f"{loss.tokens / loss.seconds:,.0f} tokens/s, {loss.seconds:.2f} s/step"
                        shares = ", ".join(f"{name} {value / loss.seconds:.0%}" for name, value in own_parts(loss))
                        told = f"{speed} ({shares})" if shares else speed
                        step.describe(f"loss {loss.loss:.4f}, {told}, {loss.peak_bytes / 1e9:.1f} GB")
                        step.advance(loss.step - step.done)
                    if last:
                        return

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()

    def _finish(self) -> Result:
        """Write the result, last of all."""
        state = self.state
        previous = state.previous or state.reopened  # whose training is over: its record is there alone
        records = [record for _, record in sorted(self.journal.finished().items())]
        parameters = self.prepared.skeleton.parameters()
        seconds, workers = self._costs()
        return state.finish(
            Result(
                command=self.recipe.command,
                fingerprint=self.journal.fingerprint,
                recipe=self.recipe.record(),
                model=ModelSize(
                    parameters_before=parameters, parameters_after=parameters, zeros_after=zeros_of(records)
                ),
                sparsity=sparsity_of(records, None),
                recovery=previous.recovery if previous else self._recovery(records),
                throughput=previous.throughput if previous else self._throughput(),
                perplexity=state.perplexities(),
                seconds=seconds,
                workers=workers,
                restarts=state.known.restarts,
            )
        )

    def _recovery(self, records: list[LayerRecord]) -> Recovery:
        prepared = self.prepared
        reports = [report for record in records for report in record.projections]
        losses = self.losses.read()
        return Recovery(
            steps=losses[-1].step if losses else prepared.steps,
            best_step=best_of(losses).step if losses and self.recipe.best else None,
            rows=len(prepared.inputs.rows),
            held_out_rows=len(prepared.inputs.held_out),
            targets=sum(loss.targets for loss in losses),
            parameters_trained=prepared.parameters_trained,
            workers=len(self.state.known.workers) or prepared.processes.count,
            zeros_before=sum(report.zeros_before for report in reports),
            zeros_after=sum(report.zeros for report in reports),
            zeros_kept=sum(report.zeros_kept or 0 for report in reports),
            losses=[
                TrainingLoss(step=loss.step, loss=loss.loss, learning_rate=loss.learning_rate, held_out=loss.held_out)
                for loss in losses
            ],
        )

    def _throughput(self) -> Throughput | None:
        """Return the speed of all steps; None where their records are gone with the training."""
        losses, recipe = self.losses.read(), self.recipe
        if not losses:
            return None
        tokens, seconds = sum(loss.tokens for loss in losses), sum(loss.seconds for loss in losses)
        speed, workers = tokens / seconds, self.state.known.workers
        gpu = workers[0].get("gpu") if workers else None
        rate = rate_of_gpu(gpu, recipe.precision == "bf16") if gpu else None
        operations = operations_of_model(self.prepared.skeleton, recipe.length, recipe.full, recipe.keep_sparsity)
        parts = parts_of(losses)
        return Throughput(
            tokens=tokens,
            tokens_per_second=round(speed, 1),
            seconds={**parts, "total": round(sum(parts.values()), 3)},
            utilisation=round(speed * operations / (rate * len(workers)), 4) if rate else None,
        )

    def _costs(self) -> tuple[dict[str, float], list[WorkerResult]]:
        """Return what the run took by phase, and who did it."""
        workers = self.state.known.workers
        if previous := self.state.previous or self.state.reopened:
            return costs_of_measuring(self.clock, previous)
        seconds = self.clock.total()
        for phase in ("load", "teacher", "train"):
            if workers and phase in workers[0]["seconds"]:
                seconds[phase] = max(worker["seconds"][phase] for worker in workers)
        return seconds, [WorkerResult(**worker) for worker in workers]
