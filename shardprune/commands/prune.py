"""The story of a run, from top to bottom."""

from contextlib import closing
from dataclasses import asdict
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend, Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.observing import Observation, observe
from shardprune.cluster.passes import Waves, load, parts_of_pass, perplexity, usage
from shardprune.cluster.pruning import prune_segments
from shardprune.cluster.pruning_job import Work
from shardprune.cluster.restarts import persevere
from shardprune.commands.composite import claim_output, second_recipe
from shardprune.commands.prepare import Plan, prepare
from shardprune.commands.state import Measurements, costs, done_already, finish, with_peaks_of
from shardprune.errors import without_credentials
from shardprune.model.saving import write_frame, write_index
from shardprune.recipes.identity import AnyRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe, WidthRecipe
from shardprune.report.clock import Clock
from shardprune.report.page.write import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import (
    CalibrationResult,
    ModelSize,
    Result,
    Sparsity,
    Structure,
    removal_of,
    sparsity_of,
    structure_of,
    zeros_of,
)
from shardprune.shard.layers import Version
from shardprune.solvers.outliers import Outliers
from shardprune.storage.folder import absolute
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord
from shardprune.storage.windows import tokens_hash

NARROWED = "structured"  # folder of an output that holds the model before its weights become zero

STEPS = ("before", "prune", "after")  # of a run; perplexity is measured before and after


def prune(recipe: PruneRecipe, reporter: Reporter | None = None) -> Result:
    """Prune a model as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same run unfinished, only what is missing is done.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        SolverError: a projection cannot be solved.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    if recipe.narrowing is not None:
        result = _prune_structured(recipe, recipe.narrowing, reporter)
    else:
        result = _carry_out(recipe, reporter)
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


def rebuild(recipe: RebuildRecipe, reporter: Reporter | None = None) -> Result:
    """Rebuild the masks of a pruned model with the help of its dense original; otherwise as `prune`."""
    reporter = reporter or Reporter()
    result = _carry_out(recipe, reporter)
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


def _carry_out(recipe: AnyRecipe, reporter: Reporter) -> Result:
    clock = Clock(reporter.events)
    with closing(backend_of(recipe.backend, recipe.address)) as backend:
        with clock.phase("plan"):
            plan = prepare(recipe, backend)
        return _go(plan, backend, reporter, clock)


def _prune_structured(recipe: PruneRecipe, narrowing: WidthRecipe, reporter: Reporter) -> Result:
    """Remove structures, then make weights of what remains zero: two runs, each with its own layer files.

    The first one's output lies in a folder of the second one's until that is finished.
    """
    if not recipe.zeroes:
        return _carry_out(narrowing, reporter)
    clock = Clock(reporter.events)
    with closing(backend_of(recipe.backend, recipe.address)) as backend:
        with clock.phase("plan"):
            out = absolute(recipe.out)
            first = prepare(narrowing.model_copy(update={"out": f"{out}/{NARROWED}"}), backend, claimed=out)
            journal, state = claim_output(recipe, first)
        result = done_already(journal, state, first.evaluations, reporter)
        if result is None:
            with reporter.events.recorded(journal.folder, **first.facts()):
                if "version" in state:  # finished, but asked to be measured on more
                    measuring = _Run(first, backend, reporter, clock, ("before",))
                    measuring.measure()
                    model, narrowed = out, Result(**state)
                    narrowed.perplexity = measuring.measured.results()
                else:
                    steps = STEPS[:-1]
                    with clock.phase("structure"):
                        model, narrowed = first.recipe.out, _go(first, backend, reporter, Clock(reporter.events), steps)
                with clock.phase("plan"):
                    second = prepare(second_recipe(recipe, first, model), backend, first.as_base())
                run = _Run(second, backend, reporter, clock)
                run.adopt(narrowed)
                result = run.go()
        journal.folder.remove_folder(NARROWED)
        return result


def _go(plan: Plan, backend: Backend, reporter: Reporter, clock: Clock, steps: tuple[str, ...] = STEPS) -> Result:
    """Carry out a plan, or return the result that its output holds; in the `steps` that are named."""
    done = done_already(plan.journal, plan.state, plan.evaluations, reporter)
    return done or _Run(plan, backend, reporter, clock, steps).go()


class _Run:
    """One run over as many attempts as it takes; each goes on from the layers that are finished."""

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        reporter: Reporter,
        clock: Clock,
        steps: tuple[str, ...] = STEPS,
    ) -> None:
        self.plan = plan
        self.steps = steps
        self.backend = backend
        self.reporter = reporter
        self.clock = clock
        self.journal: Journal = plan.journal
        self.measured = Measurements(plan.evaluations, plan.state.get("perplexity", {}))
        self.restarts: int = plan.state.get("restarts", 0)
        self.outliers = [Outliers(**layer) for layer in plan.state.get("outliers", [])]
        self.workers: list[dict[str, Any]] = []
        self.previous = Result(**plan.state) if "version" in plan.state else None
        self.narrowed: Result | None = None  # of the run that removed structures before

    def adopt(self, narrowed: Result) -> None:
        """Take over what the run that removed structures measured and did."""
        self.measured.adopt(narrowed.as_json()["perplexity"])
        self.narrowed = narrowed
        self.restarts = max(self.restarts, narrowed.restarts)

    def go(self) -> Result:
        self.journal.folder.remove_partial()
        self._save()
        recorded = self.reporter.events.recorded(self.journal.folder, **self.plan.facts())
        with self.journal.claimed(self.plan.state), recorded:
            self._say_who_works()
            self.measure()
            return self._finish()

    def _say_who_works(self) -> None:
        asked, there = (self.plan.recipe.shards or 1) * (self.plan.recipe.replicas or 1), self.plan.layout.workers
        if there < asked:
            self.reporter.say(
                f"{asked} workers were asked for; the run goes on with {there}, for which there are slots"
            )

    def measure(self) -> None:
        """Attempt the steps until they are done."""
        persevere(self._attempt, self.plan.layout, self.plan.recipe, self.backend, self.reporter, self._lost)

    def _lost(self) -> None:
        """Record that workers were lost."""
        self.restarts += 1
        self._save()

    def _attempt(self, layout: Layout) -> None:
        """Measure, observe, prune, measure again: whatever of it is not yet done."""
        plan, finished = self.plan, set(self.journal.finished())
        placed = {"shards": len(layout.shards), "replicas": layout.replicas}
        self.reporter.events.emit("attempt", finished=sorted(finished), **placed)
        if finished:
            self.reporter.say(f"{len(finished)} of {plan.skeleton.layers} layers are finished already")
        with self.clock.phase("load"):
            group = self._start(layout, finished)
        try:
            if "before" in self.steps:
                self._measure(group, layout, "before", "given" if plan.recipe.sparse else "dense")
            if "prune" in self.steps:
                self._prune(group, layout, finished)
            if "after" in self.steps:
                self._measure(group, layout, "after", "latest")
            self.workers = usage(group, layout)
        finally:
            group.close()

    def _start(self, layout: Layout, finished: set[int]) -> Group:
        """Start workers, which hold their layers where these are not streamed."""
        plan = self.plan
        group = self.backend.start(plan.worker_specs(layout, finished), plan.store_bytes())
        try:
            if not plan.streamed:
                load(group, layout, "given" if plan.recipe.sparse and self._misses("before") else "latest")
        except BaseException:
            group.close()
            raise
        return group

    def _prune(self, group: Group, layout: Layout, finished: set[int]) -> None:
        plan = self.plan
        waves = Waves(plan.calibration, layout.replicas, plan.wave)
        if len(finished) == plan.skeleton.layers:
            return
        starts = tuple(part.start for part in layout.segments if part.start and not finished.issuperset(part))
        observation = Observation(starts, None if self.outliers else plan.recipe.observed_m)
        if observation:
            parts = observation.parts(layout, waves, plan.streamed)
            with self.clock.phase("observe"), self.reporter.step("observe", parts) as step:
                inputs = [names[0] for names in plan.skeleton.family.inputs]
                found = observe(group, layout, waves, observation, inputs, plan.streamed, step)
            self.outliers = self.outliers or found
            self._save()
            if observation.outlier_m is not None and len({layer.layer for layer in found}) == 1:
                self.reporter.say("the layers' outlier ratios do not differ")
        work = Work(
            shares=plan.shares(self.outliers),
            finished=frozenset(finished),
            family=plan.skeleton.family,
            shapes=plan.shapes,
            layer_outliers=[layer.layer for layer in self.outliers],
            rebuilding=plan.recipe.rebuilding,
            measure_error=plan.recipe.measure_error,
            widths=plan.widths,
            passes_on_dense=plan.scoring is not None and not plan.scoring.correction,
        )
        parts = work.parts(layout.segments, len(waves.all))
        with self.clock.phase("prune"), self.reporter.step(plan.recipe.command, parts) as step:
            prune_segments(group, layout, waves, work, step)

    def _measure(self, group: Group, layout: Layout, when: str, version: Version) -> None:
        """Perplexity on every evaluation source, kept at once so that no later attempt measures it again."""
        for windows, record in self.measured.missing(when):
            waves = Waves(windows, layout.replicas, self.plan.wave)
            parts = parts_of_pass(waves, self.plan.skeleton.layers, self.plan.streamed)
            with self.clock.phase("evaluate"), self.reporter.step(f"perplexity {when}", parts) as step:
                record[when] = perplexity(group, layout, waves, version, self.plan.streamed, step)
            self._save()

    def _misses(self, when: str) -> bool:
        """Whether something is to be measured, before or after."""
        return when in self.steps and any(True for _ in self.measured.missing(when))

    def _save(self) -> None:
        """Record what is known, but for what a finished run's result says already."""
        if self.previous:
            return
        state = {"recipe": self.plan.record(), "perplexity": self.measured.records, "restarts": self.restarts}
        if self.outliers:
            state["outliers"] = [asdict(layer) for layer in self.outliers]
        self.journal.save(state)

    def _finish(self) -> Result:
        """Write what makes the layer files a checkpoint, and the result last."""
        plan = self.plan
        self.journal.folder.remove_partial()  # of workers that died while they wrote
        if self.previous is None:
            with self.clock.phase("write"):
                write_frame(plan.checkpoint, plan.skeleton, self.journal)
                write_index(plan.checkpoint, self.journal, plan.config_changes)
        records = [record for _, record in sorted(self.journal.finished().items())]
        size = ModelSize(
            parameters_before=plan.base.parameters if plan.base else plan.skeleton.parameters(),
            parameters_after=plan.parameters_after,
            zeros_after=zeros_of(records),
        )
        seconds, workers = costs(self.clock, self.workers, self.previous)
        if self.narrowed:
            workers = with_peaks_of(workers, self.narrowed.workers)
        result = Result(
            command=plan.recipe.command,
            fingerprint=self.journal.fingerprint,
            recipe=plan.record(),
            model=size,
            calibration=CalibrationResult(
                source=without_credentials(plan.recipe.calibration),
                samples=len(plan.calibration),
                seqlen=plan.recipe.seqlen,
                tokens_sha256=tokens_hash(plan.calibration),
            ),
            sparsity=removal_of(records, plan.recipe.target) if plan.widths else self._sparsity(records),
            structure=self._structure(size, records),
            perplexity=self.measured.results(),
            seconds=seconds,
            workers=workers,
            restarts=self.restarts,
        )
        return finish(self.journal, result, self.previous)

    def _sparsity(self, records: list[LayerRecord]) -> Sparsity:
        base = self.plan.base
        sparsity = sparsity_of(records, self.plan.recipe.target, base.weights if base else None)
        if self.narrowed is None or self.narrowed.sparsity is None:
            return sparsity
        return sparsity.model_copy(update={"before": self.narrowed.sparsity.before})  # of the model before both runs

    def _structure(self, size: ModelSize, records: list[LayerRecord]) -> Structure | None:
        if self.plan.widths:
            return structure_of(self.plan.skeleton.config, self.plan.widths, size, records)
        return self.narrowed.structure if self.narrowed else None
