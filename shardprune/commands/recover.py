"""The story of `shardprune recover`."""

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend
from shardprune.cluster.restarts import persevere
from shardprune.commands.prepare_recovery import CLAIM, PreparedRecovery, make_recovery_plan
from shardprune.commands.state import Measurements, costs_of_measuring, done_already, finish
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.saving import write_frame, write_index
from shardprune.recipes.evaluate import ShardFields
from shardprune.recipes.groups import BackendFields
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recovery.batches import Processes
from shardprune.recovery.loss_log import Losses
from shardprune.recovery.spec import HELD_OUT, ROWS
from shardprune.report.clock import Clock
from shardprune.report.page.write import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import ModelSize, Recovery, Result, TrainingLoss, WorkerResult, sparsity_of, zeros_of
from shardprune.storage.folder import Folder
from shardprune.storage.records import LayerRecord

POLL_SECONDS = 1.0  # between two looks at the losses of a training under way


def recover(recipe: RecoverRecipe, reporter: Reporter | None = None) -> Result:
    """Fine-tune a pruned model as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same training unfinished, it goes on from its last checkpoint.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    clock = Clock(reporter.events)
    with closing(backend_of(recipe.backend, recipe.address)) as backend:
        with clock.phase("plan"):
            plan = make_recovery_plan(recipe, backend)
        done = done_already(plan.journal, plan.state, plan.inputs.evaluations, reporter)
        result = done or _Recovery(plan, backend, reporter, clock).go()
    assert plan.recipe.state is not None
    if os.path.isdir(plan.recipe.state):
        shutil.rmtree(plan.recipe.state)
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


class _Recovery:
    """One training over as many attempts as it takes."""

    def __init__(self, plan: PreparedRecovery, backend: Backend, reporter: Reporter, clock: Clock) -> None:
        self.plan, self.backend, self.reporter, self.clock = plan, backend, reporter, clock
        self.journal = plan.journal
        self.measured = Measurements(plan.inputs.evaluations, plan.state.get("perplexity", {}))
        self.restarts: int = plan.state.get("restarts", 0)
        self.previous = Result(**plan.state) if "version" in plan.state else None
        self.workers: list[dict[str, Any]] = plan.state.get("workers", [])  # what they took; a dict each
        assert plan.recipe.state is not None
        self.losses = Losses(plan.recipe.state)

    def go(self) -> Result:
        self.journal.folder.remove_partial()
        self._save()
        recorded = self.reporter.events.recorded(self.journal.folder, command=self.plan.recipe.command)
        with self.journal.claimed(self.plan.state), recorded:
            self._measure("before", self.plan.recipe.model)
            if self.previous is None:
                self._say_what_is_lost()
                self._train()
                self._write_rest()
            self._measure("after", self.plan.recipe.out)
            return self._finish()

    # -- the steps ----------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Train and write the layers, unless all of that is done."""
        plan = self.plan
        frame = self.journal.folder.is_file(self.journal.frame_file) or not plan.recipe.full
        if frame and len(self.journal.finished()) == plan.skeleton.layers:
            return
        self._prepare()
        room = min(self.backend.room(plan.recipe.device), plan.processes.count)
        persevere(
            self._attempt, plan.processes.shrunk_to(int(room)), plan.recipe, self.backend, self.reporter, self._lost
        )
        self._save()

    def _prepare(self) -> None:
        """Put what the processes read where all of them see it."""
        plan = self.plan
        assert plan.recipe.state is not None
        folder = Folder(plan.recipe.state, "state")
        folder.write_text(CLAIM, plan.claim)
        folder.remove_partial()
        plan.inputs.rows.save(folder, ROWS)
        if len(plan.inputs.held_out):
            plan.inputs.held_out.save(folder, HELD_OUT)

    def _attempt(self, processes: Processes) -> None:
        with self.clock.phase("recover"), self._progress():
            self.workers = self.backend.train(self.plan.spec(processes), processes.count)

    def _write_rest(self) -> None:
        """What makes the layer files a checkpoint."""
        plan = self.plan
        self.journal.folder.remove_partial()
        with self.clock.phase("write"):
            if not plan.recipe.full:
                write_frame(plan.inputs.checkpoint, plan.skeleton, self.journal)
            write_index(plan.inputs.checkpoint, self.journal, {})

    def _measure(self, when: str, model: str) -> None:
        """Perplexity on every evaluation source, over shards: one for each worker that trains."""
        missing = list(self.measured.missing(when))
        if not missing:
            return
        recipe = self.plan.recipe
        shared = recipe.model_dump(include=set(BackendFields.model_fields))
        room = self.backend.slots().workers(recipe.device)  # which may be less than the training had
        shards = ShardFields(
            **shared, shards=max(1, min(recipe.workers or 1, self.plan.skeleton.layers, room)), replicas=1
        )
        with closing(ShardedModel(model, shards, self.backend, self.reporter)) as sharded:
            for windows, record in missing:
                with self.clock.phase("evaluate"):
                    record[when] = sharded.perplexity(windows)
                self._save()

    # -- what is said and kept -------------------------------------------------------------------------------------

    def _say_what_is_lost(self) -> None:
        zeros = self.plan.zeros
        if zeros and zeros.sparse and not self.plan.recipe.keep_sparsity:
            share = zeros.count / zeros.weights
            self.reporter.say(
                f"{zeros.count:,} zeros ({share:.1%} of the projections' weights) will be lost; "
                "--keep-sparsity keeps them"
            )

    @contextmanager
    def _progress(self) -> Iterator[None]:
        """Show the steps of the training while the block lasts."""
        over = threading.Event()
        with self.reporter.step("recover", self.plan.steps) as step:

            def follow() -> None:
                while True:
                    last = over.wait(POLL_SECONDS)
                    losses = self.losses.read()
                    if losses and losses[-1].step > step.done:
                        step.describe(f"loss {losses[-1].loss:.4f}")
                        step.advance(losses[-1].step - step.done)
                    if last:
                        return

            thread = threading.Thread(target=follow, daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()

    def _lost(self) -> None:
        self.restarts += 1
        self._save()

    def _save(self) -> None:
        """Record what is known, but for what a finished run's result says already."""
        if self.previous is None:
            known = {"perplexity": self.measured.records, "restarts": self.restarts, "workers": self.workers}
            known["zeros"] = asdict(self.plan.zeros) if self.plan.zeros else None
            self.journal.save({"recipe": self.plan.recipe.record(), **known})

    def _finish(self) -> Result:
        """Write the result, last of all."""
        plan = self.plan
        records = [record for _, record in sorted(self.journal.finished().items())]
        parameters = plan.skeleton.parameters()
        seconds, workers = self._costs()
        result = Result(
            command=plan.recipe.command,
            fingerprint=self.journal.fingerprint,
            recipe=plan.recipe.record(),
            model=ModelSize(parameters_before=parameters, parameters_after=parameters, zeros_after=zeros_of(records)),
            sparsity=sparsity_of(records, None),
            recovery=self.previous.recovery if self.previous else self._recovery(records),
            perplexity=self.measured.results(),
            seconds=seconds,
            workers=workers,
            restarts=self.restarts,
        )
        return finish(self.journal, result, self.previous)

    def _recovery(self, records: list[LayerRecord]) -> Recovery:
        plan = self.plan
        reports = [report for record in records for report in record.projections]
        losses = self.losses.read()
        return Recovery(
            steps=plan.steps,
            rows=len(plan.inputs.rows),
            held_out_rows=len(plan.inputs.held_out),
            targets=sum(loss.targets for loss in losses),
            parameters_trained=plan.parameters_trained,
            workers=len(self.workers) or plan.processes.count,
            zeros_before=sum(report.zeros_before for report in reports),
            zeros_after=sum(report.zeros for report in reports),
            zeros_kept=sum(report.zeros_kept or 0 for report in reports),
            losses=[
                TrainingLoss(step=loss.step, loss=loss.loss, learning_rate=loss.learning_rate, held_out=loss.held_out)
                for loss in losses
            ],
        )

    def _costs(self) -> tuple[dict[str, float], list[WorkerResult]]:
        """What the run took by phase, and who did it."""
        if self.previous:
            return costs_of_measuring(self.clock, self.previous)
        seconds = self.clock.total()
        for phase in ("load", "train"):
            if self.workers:
                seconds[phase] = max(worker["seconds"][phase] for worker in self.workers)
        return seconds, [WorkerResult(**worker) for worker in self.workers]
