"""The story of `shardprune mop`: iteration after iteration a layer goes, or every layer gets narrower."""

from contextlib import closing
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend, Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.mop import ModelOnWorkers, Shallower
from shardprune.cluster.passes import account, usage
from shardprune.cluster.restarts import persevere
from shardprune.cluster.scoring import better
from shardprune.commands.prepare import Plan, prepare
from shardprune.commands.state import Measurements, costs, done_already, finish
from shardprune.errors import InputError, without_credentials
from shardprune.model.saving import write_frame, write_index
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.budget import Budget
from shardprune.model.structure.kept_iterations import KeptIterations, parse_keep
from shardprune.model.structure.path import Letter, State
from shardprune.model.structure.path_plan import PathPlan
from shardprune.model.structure.shape import changes, costs_of, possible_groups, reshaped, widths_of
from shardprune.recipes.mop import MopRecipe
from shardprune.report.clock import Clock
from shardprune.report.page.write import leave_report
from shardprune.report.progress import Reporter, Step
from shardprune.report.result import CalibrationResult, Iteration, ModelSize, Result, Structure, shape_of
from shardprune.shard.current_layers import Saved
from shardprune.shard.mop_worker import MopWorker
from shardprune.solvers.scoring import Criterion
from shardprune.storage.journal import Journal
from shardprune.storage.windows import tokens_hash

SAVED = "layers-"  # how folders begin that hold the layers of the last iteration which changed them


def mop(recipe: MopRecipe, reporter: Reporter | None = None) -> Result:
    """Make a model shallower and narrower as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same run unfinished, it goes on after the last finished iteration.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        SolverError: a projection cannot be corrected.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    clock = Clock(reporter.events)
    with closing(backend_of(recipe.backend, recipe.address)) as backend:
        with clock.phase("plan"):
            plan = prepare(recipe, backend)
            course = path_plan_of(recipe, plan.skeleton)
            course.check()
        search = _Search(plan, course, backend, reporter, clock)
        search.check_kept()
        if done := done_already(plan.journal, plan.state, plan.evaluations, reporter):
            search.remove_saved()
        result = done or search.go()
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


def path_plan_of(recipe: MopRecipe, skeleton: Skeleton) -> PathPlan:
    """The course that a recipe asks for."""
    prefix = f"{skeleton.family.layers}.0."
    tensors = {name.removeprefix(prefix): shape for name, shape in skeleton.layer_tensors(0).items()}
    config, parameters = skeleton.config, skeleton.parameters()
    widths = widths_of(config)
    groups = (widths.groups,) if recipe.mlp_only else possible_groups(config)
    return PathPlan(
        start=State(skeleton.layers, widths, Budget(costs_of(config, tensors), groups, recipe.neuron_multiple)),
        parameters=parameters,
        request=None if recipe.remove is None else round(recipe.remove * parameters),
        letters=recipe.path,
        seed=recipe.seed if recipe.criterion == "random" else None,
        keeping=parse_keep(recipe.keep) if recipe.keep else KeptIterations(),
    )


class _Search:
    """One search over as many attempts as it takes; each goes on after the last finished iteration."""

    def __init__(self, plan: Plan, course: PathPlan, backend: Backend, reporter: Reporter, clock: Clock) -> None:
        assert isinstance(plan.recipe, MopRecipe)
        self.plan, self.recipe, self.course = plan, plan.recipe, course
        self.backend, self.reporter, self.clock = backend, reporter, clock
        self.journal = plan.journal
        self.measured = Measurements(plan.evaluations, plan.state.get("perplexity", {}))
        self.restarts: int = plan.state.get("restarts", 0)
        structure = plan.state.get("structure") or {}
        self.path = [Iteration(**entry) for entry in plan.state.get("path", structure.get("path", []))]
        self.saved: str | None = plan.state.get("saved")
        self.previous = Result(**plan.state) if "version" in plan.state else None
        self.workers: list[dict[str, Any]] = []

    def check_kept(self) -> None:
        """Check that no iteration is to be kept that is past and was not.

        Raises:
            InputError: names the first one.
        """
        before = self.course.start
        for entry in self.path:
            now = before.after(entry.step, self.course.request)
            if entry.folder is None and self.course.kept(before, now):
                reason = f"iteration {entry.iteration} is past and was not kept; choose an empty directory"
                raise InputError("keep", f"{self.recipe.keep!r} comes too late: {reason}")
            before = now

    # -- the story --------------------------------------------------------------------------------------------

    def go(self) -> Result:
        self.journal.folder.remove_partial()
        self._save()
        self.remove_saved()
        recorded = self.reporter.events.recorded(self.journal.folder, **self.plan.facts())
        with self.journal.claimed(self.plan.state), recorded:
            persevere(self._attempt, self.plan.layout, self.recipe, self.backend, self.reporter, self._lost)
            return self._finish()

    def _attempt(self, layout: Layout) -> None:
        """Measure, search, measure again: whatever of it is not yet done."""
        plan = self.plan
        with self.clock.phase("load"):
            group = self.backend.start(plan.worker_specs(layout, set()), plan.store_bytes(), MopWorker)
        try:
            model = self._current(group, layout)
            state = self._state()
            while candidates := self.course.candidates(state):
                state = self._iterate(model, state, candidates)
            self._measure(model, "after")
            if self.previous is None:
                self._write(model, self.recipe.out)
            self.workers = usage(group, layout)
        finally:
            group.close()

    def _current(self, group: Group, layout: Layout) -> ModelOnWorkers:
        """The model after the last finished iteration on the workers, which have measured the original before."""
        plan, state = self.plan, self._state()
        shards, replicas, tokens, wave = len(layout.shards), layout.replicas, plan.calibration, plan.wave
        start = self.course.start
        scoring = self.recipe.scoring
        inputs = [names[0] for names in plan.skeleton.family.inputs]
        model = ModelOnWorkers(
            group, shards, replicas, tokens, wave, range(start.layers), start.widths, scoring, inputs
        )
        compared = self._criterion if self._criterion != "perplexity" and self.course.candidates(state) else None
        if compared or not self.path or any(self.measured.missing("before")):
            model.read(None)
            self._measure(model, "before")
        if compared:
            with self.clock.phase("search"), self.reporter.step("original", self._refer_parts(model)) as step:
                model.refer(step)
        if self.path:
            self.reporter.say(f"{len(self.path)} iterations are finished already")
            model = ModelOnWorkers(group, shards, replicas, tokens, wave, self._layers(), state.widths, scoring, inputs)
            model.read(self._saved(state))
        return model

    def _iterate(self, model: ModelOnWorkers, state: State, candidates: dict[Letter, State]) -> State:
        """Build and score candidates, adopt one, and record it."""
        chosen = self.course.choice(state, candidates)
        built = candidates if self._criterion else {letter: candidates[letter] for letter in (chosen,) if letter}
        label, parts = f"iteration {state.iteration + 1}", self._parts(model, built)
        with self.clock.phase("search"), self.reporter.step(label, parts) as step:
            shorter, scores = self._build(model, built, step)
            if chosen is None:
                assert self._criterion is not None
                chosen = "L" if better(self._criterion, scores["L"], scores["G"]) else "G"
            after = candidates[chosen]
            if chosen != "L":
                model.adopt_narrower(after.widths)
            elif shorter is not None:
                model.adopt_shallower(shorter.layer)
            self._account(model)
        entry = Iteration(
            iteration=after.iteration,
            step=chosen,
            layer=shorter.layer if shorter and chosen == "L" else None,
            shape=shape_of(reshaped(self.plan.skeleton.config, after.widths, model.layers)),
            removed=self.course.share(after),
            scores=scores,
        )
        if self.course.kept(state, after):
            entry.folder = f"iteration-{after.iteration:02d}"
            self._write(model, self._folder(entry.folder))
        self._record(model, entry)
        self.reporter.events.emit("iteration", iteration=entry.iteration, step=entry.step, **self._progress(entry))
        self.reporter.say(_line(entry))
        return after

    def _build(
        self, model: ModelOnWorkers, built: dict[Letter, State], step: Step
    ) -> tuple[Shallower | None, dict[str, float]]:
        """Build candidates, two of them at the same time; the shallower one, and the scores by letter."""
        recipe, criterion = self.recipe, self._criterion
        narrow = next((letter for letter in built if letter != "L"), None)
        rule = recipe.depth_rule if "L" in built else None
        shorter, score = model.candidates(rule, built[narrow].widths if narrow else None, criterion, step)
        scores = {"L": shorter.score if shorter else None, "G": score}
        return shorter, {letter: value for letter, value in scores.items() if value is not None}

    def _record(self, model: ModelOnWorkers, entry: Iteration) -> None:
        """Make an iteration a finished one: layers that became narrower are saved, then the path says so."""
        saved = self.saved
        if entry.step != "L":
            saved = entry.folder or f"{SAVED}{entry.iteration:02d}"
            if entry.folder is None:
                model.write(self._folder(saved), range(self.course.start.layers))
        self.saved = saved
        self.path.append(entry)
        self._save()
        self.remove_saved()

    def remove_saved(self) -> None:
        """Remove saved layers of iterations that are no longer the last with narrower layers."""
        for name in self.journal.folder.names():
            if name.startswith(SAVED) and name != self.saved:
                self.journal.folder.remove_folder(name)

    def _finish(self) -> Result:
        """Write the result last."""
        plan, recipe, state = self.plan, self.recipe, self._state()
        config = plan.skeleton.config
        after = reshaped(config, state.widths, self._layers())
        size = ModelSize(
            parameters_before=plan.skeleton.parameters(), parameters_after=Skeleton(after, "cpu").parameters()
        )
        assert size.parameters_before - size.parameters_after == state.removed, "not what the path removes"
        seconds, workers = costs(self.clock, self.workers, self.previous)
        result = Result(
            command=recipe.command,
            fingerprint=self.journal.fingerprint,
            recipe=plan.record(),
            model=size,
            calibration=CalibrationResult(
                source=without_credentials(recipe.calibration),
                samples=len(plan.calibration),
                seqlen=recipe.seqlen,
                tokens_sha256=tokens_hash(plan.calibration),
            ),
            structure=Structure(
                before=shape_of(config),
                after=shape_of(after),
                removed=size.removed,
                kept=self._layers(),
                path=self.path,
            ),
            perplexity=self.measured.results(),
            seconds=seconds,
            workers=workers,
            restarts=self.restarts,
        )
        result = finish(self.journal, result, self.previous)
        self.saved = None
        self.remove_saved()
        return result

    # -- what is known ----------------------------------------------------------------------------------------

    @property
    def _criterion(self) -> Criterion | None:
        """What candidates are scored by; None where the path is known and scores are not asked for."""
        known = self.recipe.path is not None or self.recipe.criterion == "random"
        return None if known and not self.recipe.scores else self.recipe.scored_by

    def _state(self) -> State:
        """Where the finished iterations have led."""
        state = self.course.start
        for entry in self.path:
            state = state.after(entry.step, self.course.request)
        return state

    def _layers(self, iterations: int | None = None) -> list[int]:
        """The layers that the finished iterations have left, or the first ones of them."""
        gone = {entry.layer for entry in self.path[:iterations]}
        return [index for index in range(self.course.start.layers) if index not in gone]

    def _folder(self, name: str) -> str:
        return f"{self.recipe.out}/{name}"

    def _saved(self, state: State) -> Saved | None:
        """Where the current layers lie, if not in the checkpoint: in the output of a finished run, or saved."""
        if self.previous:
            return Saved(self.recipe.out, state.widths, tuple(self._layers()))
        if self.saved is None:
            return None
        saved = range(self.course.start.layers)
        kept = next((entry.iteration for entry in self.path if entry.folder == self.saved), None)
        layers = saved if kept is None else self._layers(kept)
        return Saved(self._folder(self.saved), state.widths, tuple(layers))

    def _progress(self, entry: Iteration) -> dict[str, float]:
        """The share of the parameters that an iteration has left removed, and of the request where there is one."""
        done = {"removed": entry.removed}
        return done | ({"share": min(1.0, entry.removed / self.recipe.remove)} if self.recipe.remove else {})

    def _parts(self, model: ModelOnWorkers, built: dict[Letter, State]) -> int:
        """The number of parts that an iteration reports to its progress step."""
        parts, scored, layers = 0, self._criterion is not None, len(model.layers)
        for letter in built:
            if letter == "L":
                passes = {"third-last": 0, "cosine": 1, "perplexity": layers}[self.recipe.depth_rule]
                again = scored and not (self.recipe.depth_rule == "perplexity" == self._criterion)
                parts += model.waves_of(model.shortening) * (passes + again)
            else:
                parts += model.waves_of(model.narrowing) * (model.passes_to_narrow() + scored)
        return parts

    def _refer_parts(self, model: ModelOnWorkers) -> int:
        teams = {team.members: team for team in (model.narrowing, model.shortening)}
        return sum(model.waves_of(team) for team in teams.values())

    def _account(self, model: ModelOnWorkers) -> None:
        """Record what the workers have done since the last time."""
        account(model.group, model.jury(model.all).layout, range(model.shards), self.reporter.events.emit)

    # -- what is kept -----------------------------------------------------------------------------------------

    def _measure(self, model: ModelOnWorkers, when: str) -> None:
        """Perplexity on every evaluation source, kept at once so that no later attempt measures it again."""
        for windows, record in self.measured.missing(when):
            jury = model.jury(model.all, windows)
            label, parts = f"perplexity {when}", len(jury.waves.all)
            with self.clock.phase("evaluate"), self.reporter.step(label, parts) as step:
                (record[when],) = jury.scores("perplexity", [None], "dense", step)
            self._account(model)
            self._save()

    def _write(self, model: ModelOnWorkers, folder: str) -> None:
        """Write the current model as an ordinary checkpoint."""
        checkpoint, layers = self.plan.checkpoint, model.layers
        journal = Journal(folder, self.journal.fingerprint, len(layers), checkpoint.stored_name)
        model.write(folder, layers)
        self._account(model)
        with self.clock.phase("write"):
            write_frame(checkpoint, self.plan.skeleton, journal)
            write_index(checkpoint, journal, changes(self.plan.skeleton.config, model.widths, layers))
        journal.folder.remove_partial()  # of workers that died while they wrote

    def _lost(self) -> None:
        """Record that workers were lost."""
        self.restarts += 1
        self._save()

    def _save(self) -> None:
        """Record what is known, but for what a finished run's result says already."""
        if self.previous:
            return
        self.journal.save(
            {
                "recipe": self.plan.record(),
                "perplexity": self.measured.records,
                "restarts": self.restarts,
                "path": [entry.model_dump(mode="json", exclude_none=True) for entry in self.path],
                "saved": self.saved,
            }
        )


def _line(entry: Iteration) -> str:
    """An iteration in one line."""
    shape, scores = entry.shape, ", ".join(f"{letter} {score:.4f}" for letter, score in entry.scores.items())
    what = f"layer {entry.layer} goes" if entry.step == "L" else f"{shape.groups} groups, {shape.neurons} neurons"
    parts = [f"iteration {entry.iteration}: {entry.step}", what, f"{entry.removed:.4f} removed", scores]
    return "; ".join(part for part in parts if part)
