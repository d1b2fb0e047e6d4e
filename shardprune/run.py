"""The story of a run, from top to bottom."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from shardprune.calibration import tokens_hash
from shardprune.cluster.group import Backend, Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.local_backend import LocalBackend
from shardprune.cluster.observing import Observation, observe
from shardprune.cluster.passes import Waves, parts_of_perplexity, perplexity
from shardprune.cluster.pruning import prune_segments
from shardprune.cluster.work import Work
from shardprune.errors import WorkerLost, without_credentials
from shardprune.journal import Journal
from shardprune.output import write_frame, write_index
from shardprune.plan import Plan, make_plan
from shardprune.progress import Output
from shardprune.recipe import AnyRecipe, RebuildRecipe, Recipe
from shardprune.result import (
    CalibrationResult,
    ModelSize,
    Perplexity,
    Result,
    WorkerResult,
    sparsity_of,
)
from shardprune.shard.layers import Version
from shardprune.solvers.outliers import Outliers


class Clock:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def total(self) -> dict[str, float]:
        """All phases and their total so far, rounded to milliseconds."""
        return {name: round(value, 3) for name, value in self.seconds.items()} | {
            "total": round(time.monotonic() - self._started, 3)
        }


def prune(recipe: Recipe, output: Output | None = None) -> Result:
    """Prune a model as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same run unfinished, only what is missing is done.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        SolverError: a projection cannot be solved.
        WorkerLost: workers died more than `max_restarts` times.
    """
    return _carry_out(recipe, output or Output())


def rebuild(recipe: RebuildRecipe, output: Output | None = None) -> Result:
    """Rebuild the masks of a pruned model with the help of its dense original; otherwise as `prune`."""
    return _carry_out(recipe, output or Output())


def _carry_out(recipe: AnyRecipe, output: Output) -> Result:
    clock = Clock()
    backend = _backend(recipe)
    try:
        with clock.phase("plan"):
            plan = make_plan(recipe, backend)
        if result := _done_already(plan):
            output.say(f"{plan.recipe.out} is finished already")
            return result
        return _Run(plan, backend, output, clock).go()
    finally:
        backend.close()


def _backend(recipe: AnyRecipe) -> Backend:
    if recipe.backend == "local":
        return LocalBackend()
    from shardprune.cluster.ray_backend import RayBackend

    return RayBackend(recipe.address)


def _done_already(plan: Plan) -> Result | None:
    """The result of a finished run that lacks nothing of what is asked for."""
    if "sparsity" not in plan.state:
        return None
    result = Result(**plan.state)
    measured = {source: record.tokens_sha256 for source, record in result.perplexity.items()}
    wanted = {source: tokens_hash(windows) for source, windows in plan.evaluations.items()}
    return result if wanted.items() <= measured.items() else None


class _Run:
    """One run over as many attempts as it takes; each goes on from the layers that are finished."""

    def __init__(self, plan: Plan, backend: Backend, output: Output, clock: Clock) -> None:
        self.plan = plan
        self.backend = backend
        self.output = output
        self.clock = clock
        self.journal: Journal = plan.journal
        self.perplexity: dict[str, dict[str, Any]] = dict(plan.state.get("perplexity", {}))
        self.restarts: int = plan.state.get("restarts", 0)
        self.outliers = [Outliers(**layer) for layer in plan.state.get("outliers", [])]
        self.workers: list[dict[str, Any]] = []
        self.previous = Result(**plan.state) if "sparsity" in plan.state else None

    def go(self) -> Result:
        self.journal.folder.remove_partial()
        self._save()
        layout, lost = self.plan.layout, 0
        while True:
            try:
                self._attempt(layout)
                break
            except WorkerLost as error:
                lost += 1
                self.restarts += 1
                self._save()
                if lost > self.plan.recipe.max_restarts:
                    raise
                self.output.say(f"a worker was lost ({error}); going on with what is left")
                slots = self.backend.settle()
                left = slots.workers(self.plan.recipe.device)
                if not left:
                    raise
                layout = self.plan.layout.shrunk_to(left)
        return self._finish()

    def _attempt(self, layout: Layout) -> None:
        """Measure, observe, prune, measure again: whatever of it is not yet done."""
        plan, finished = self.plan, set(self.journal.finished())
        if finished:
            self.output.say(f"{len(finished)} of {plan.skeleton.layers} layers are finished already")
        with self.clock.phase("load"):
            group = self.backend.start(plan.worker_specs(layout, finished), plan.store_bytes())
        try:
            with self.clock.phase("evaluate"):
                self._measure(group, layout, "before", "given" if plan.recipe.sparse else "dense")
            self._prune(group, layout, finished)
            with self.clock.phase("evaluate"):
                self._measure(group, layout, "after", "latest")
            self.workers = [
                group.get(group.submit(shard, replica, "usage"))
                for shard in range(len(layout.shards))
                for replica in range(layout.replicas)
            ]
        finally:
            group.close()

    def _prune(self, group: Group, layout: Layout, finished: set[int]) -> None:
        plan = self.plan
        waves = Waves(plan.calibration, layout.replicas, plan.wave)
        if len(finished) == plan.skeleton.layers:
            return
        starts = tuple(part.start for part in layout.segments if part.start and not finished.issuperset(part))
        observation = Observation(starts, None if self.outliers else plan.recipe.observed_m)
        if observation:
            parts = observation.parts(layout, waves, plan.streamed)
            with self.clock.phase("observe"), self.output.step("observe", parts) as step:
                found = observe(group, layout, waves, observation, plan.streamed, step)
            self.outliers = self.outliers or found
            self._save()
            if observation.outlier_m is not None and len({layer.layer for layer in found}) == 1:
                self.output.say("the layers' outlier ratios do not differ")
        work = Work(
            shares=plan.shares(self.outliers),
            finished=frozenset(finished),
            family=plan.skeleton.family,
            shapes=plan.shapes,
            layer_outliers=[layer.layer for layer in self.outliers],
            rebuilding=plan.recipe.rebuilding,
            measure_error=plan.recipe.measure_error,
        )
        parts = work.parts(layout.segments, len(waves.all))
        with self.clock.phase("prune"), self.output.step(plan.recipe.command, parts) as step:
            prune_segments(group, layout, waves, work, step)

    def _measure(self, group: Group, layout: Layout, when: str, version: Version) -> None:
        """Perplexity on every evaluation source, kept at once so that no later attempt measures it again."""
        for source, windows in self.plan.evaluations.items():
            tokens = {"seqlen": windows.shape[1], "windows": len(windows), "tokens_sha256": tokens_hash(windows)}
            record = self.perplexity.get(source, {})
            if not tokens.items() <= record.items():  # never measured, or on another text
                record = self.perplexity[source] = tokens
            if record.get(when) is not None:
                continue
            waves = Waves(windows, layout.replicas, self.plan.wave)
            parts = parts_of_perplexity(waves, self.plan.skeleton.layers, self.plan.streamed)
            with self.output.step(f"perplexity {when}", parts) as step:
                record[when] = perplexity(group, layout, waves, version, self.plan.streamed, step)
            self._save()

    def _save(self) -> None:
        state = {"recipe": self.plan.recipe.record(), "perplexity": self.perplexity, "restarts": self.restarts}
        if self.outliers:
            state["outliers"] = [asdict(layer) for layer in self.outliers]
        self.journal.save(state)

    def _finish(self) -> Result:
        """Write what makes the layer files a checkpoint, and the result last."""
        plan = self.plan
        self.journal.folder.remove_partial()  # of workers that died while they wrote
        with self.clock.phase("write"):
            write_frame(plan.checkpoint, plan.skeleton, self.journal)
            write_index(plan.checkpoint, plan.skeleton, self.journal)
        records = [record for _, record in sorted(self.journal.finished().items())]
        parameters = plan.skeleton.parameters()
        seconds = self.clock.total()
        for phase, key in (("load", "load_seconds"), ("write", "write_seconds")):
            seconds[phase] = round(seconds.get(phase, 0.0) + max(worker[key] for worker in self.workers), 3)
        workers = [WorkerResult(**worker) for worker in self.workers]
        if self.previous:  # only measured on more: what pruning took, and who did it, stays
            evaluate = seconds["evaluate"] + self.previous.seconds.get("evaluate", 0.0)
            seconds, workers = {**self.previous.seconds, "evaluate": evaluate}, self.previous.workers
        result = Result(
            command=plan.recipe.command,
            fingerprint=self.journal.fingerprint,
            recipe=plan.recipe.record(),
            model=ModelSize(parameters_before=parameters, parameters_after=parameters),
            calibration=CalibrationResult(
                source=without_credentials(plan.recipe.calibration),
                samples=len(plan.calibration),
                seqlen=plan.recipe.seqlen,
                tokens_sha256=tokens_hash(plan.calibration),
            ),
            sparsity=sparsity_of(records, plan.recipe.target),
            perplexity={source: Perplexity(**record) for source, record in self.perplexity.items()},
            seconds=seconds,
            workers=workers,
            restarts=self.restarts,
        )
        self.journal.finish(result.as_json())
        return result
