"""The story of `shardprune mop`: iteration after iteration a layer goes, or every layer gets narrower."""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.group import Backend, Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.mop import ModelOnWorkers
from shardprune.cluster.mop_training import Training, train_layers
from shardprune.cluster.passes import account, digests, usage
from shardprune.cluster.restarts import Attempts
from shardprune.cluster.scoring import best_letter
from shardprune.commands.prepare_mop import prepare_mop
from shardprune.commands.prepared import Prepared
from shardprune.commands.pushing import pushed
from shardprune.commands.state import RunState, When, costs
from shardprune.commands.tuned_candidates import CandidateTuning
from shardprune.errors import InputError
from shardprune.model.saving import write_frame, write_index
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.path import Letter, State
from shardprune.model.structure.path_plan import PathPlan
from shardprune.model.structure.shape import Widths, changes, reshaped
from shardprune.recipes.mop import MopRecipe
from shardprune.report.achieved import improvements_of, shape_of
from shardprune.report.clock import Clock
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import ImprovementResult, Iteration, ModelSize, Result, Structure
from shardprune.shard.current_layers import Saved
from shardprune.shard.mop_worker import MopWorker
from shardprune.solvers.scoring import Criterion
from shardprune.storage.journal import Journal
from shardprune.storage.output_names import kept_folder
from shardprune.storage.retrying import preflight

SAVED = "layers-"  # how folders begin that hold the layers of the last iteration which changed them


@pushed
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
    with closing(backend_of(recipe)) as backend:
        with clock.phase("plan"):
            prepared, path_plan = prepare_mop(recipe, backend)
        run = MopRun(recipe, prepared, path_plan, backend, reporter, clock)
        run.check_kept()
        if run.tuning and run.state.previous is None:
            with preflight():
                run.tuning.check()
        if done := run.state.done(reporter, lambda name: True):  # from the last iteration nothing leads back
            run.remove_saved()
        result = done or run.go()
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


class MopRun:
    """One run over as many attempts as it takes; each goes on after the last finished iteration."""

    def __init__(
        self,
        recipe: MopRecipe,
        prepared: Prepared,
        path_plan: PathPlan,
        backend: Backend,
        reporter: Reporter,
        clock: Clock,
    ) -> None:
        self.recipe, self.prepared, self.path_plan = recipe, prepared, path_plan
        self.backend, self.reporter, self.clock = backend, reporter, clock
        self.journal = prepared.journal
        self.state = RunState(
            prepared.journal, prepared.earlier, prepared.record(), prepared.evaluations, prepared.inputs
        )
        self.workers: list[dict[str, Any]] = []  # what each says of itself
        self.tuning = CandidateTuning(recipe, prepared.placement.out, backend) if recipe.tune_candidates else None
        self._continued = False

    def check_kept(self) -> None:
        """Check that no iteration is to be kept that is past and was not.

        Raises:
            InputError: names the first one.
        """
        before = self.path_plan.start
        for entry in self.state.known.path:
            now = before.after(entry.step, self.path_plan.request)
            if entry.folder is None and self.path_plan.kept(before, now):
                reason = f"iteration {entry.iteration} is past and was not kept; choose an empty directory"
                raise InputError("keep", f"{self.recipe.keep!r} comes too late: {reason}")
            before = now

    # -- the story --------------------------------------------------------------------------------------------

    def go(self) -> Result:
        """Carry out the run in its output, and return its result."""
        prepared, device = self.prepared, self.prepared.placement.workers.device
        with self.state.running(self.reporter, **prepared.facts()):
            self.remove_saved()
            self._check_saved()
            if self.recipe.reconstruct and self.state.resumed and not self.path_plan.candidates(self._where()):
                self._written(self._layers()).remove_damaged(self.reporter.say)
            restarts = self.recipe.max_restarts
            prepared.text.complete(self.state, restarts, self.backend, self.reporter, self.clock)
            for attempt in Attempts(prepared.layout, device, restarts, self.backend, self.reporter, self.state.lost):
                with attempt as layout:
                    self._attempt(layout)
            return self._finish()

    def _attempt(self, layout: Layout) -> None:
        """Measure, remove, measure again: whatever of it is not yet done."""
        while not self._go_on(layout):
            self._tune()

    def _go_on(self, layout: Layout) -> bool:
        """Go on until all is done, which returns True, or until candidates are written that are to be tuned."""
        with self.clock.phase("load"):
            group = self._start(layout)
        with closing(group):
            model = self._current(group, layout)
            where = self._where()
            while candidates := self.path_plan.candidates(where):
                if self.tuning and where.iteration + 1 not in self.tuning.known:
                    self._write_candidates(model, where, candidates, self.tuning)
                    return False
                where = self._iterate(model, where, candidates)
            if self.recipe.reconstruct and self.state.previous is None:
                self._train(model, where)
            self._measure(model, "after")
            if self.state.previous is None:
                self._write(model, self.prepared.placement.out, written=self.recipe.reconstruct > 0)
            self.workers = usage(group, layout)
        return True

    def _start(self, layout: Layout) -> Group:
        prepared = self.prepared
        # Half of the replicas have all waves of a candidate, and what they are compared with.
        kept = prepared.kept_bytes(max(1, layout.replicas // 2), 1 + (self.recipe.scored_by != "perplexity"))
        # Layers move to another shard, or are narrowed on another replica.
        sent = 2 * prepared.layout.replicas * prepared.layer_bytes
        return self.backend.start(prepared.worker_specs(layout, set(), kept), prepared.store_bytes(sent), MopWorker)

    def _current(self, group: Group, layout: Layout) -> ModelOnWorkers:
        """The model after the last finished iteration on the workers, which have measured the original before."""
        prepared, where = self.prepared, self._where()
        shards, replicas, tokens, wave = len(layout.shards), layout.replicas, prepared.calibration, prepared.wave
        start = self.path_plan.start
        scoring, skeleton = self.recipe.scoring, prepared.skeleton
        model = ModelOnWorkers(
            group, shards, replicas, tokens, wave, range(start.layers), start.widths, scoring, skeleton
        )
        compared = self._criterion if self._criterion != "perplexity" and self.path_plan.candidates(where) else None
        if compared or not self.state.known.path or any(True for _ in self.state.missing("before")):
            model.read(None)
            self._measure(model, "before")
            self.state.learn(digests(group, layout))
        if compared:
            with self.clock.phase("search"), self.reporter.step("original", self._refer_parts(model)) as step:
                model.refer(step)
        if self.state.known.path:
            if not self._continued:
                self.reporter.say(f"{len(self.state.known.path)} iterations are finished already")
            layers = self._layers()
            model = ModelOnWorkers(group, shards, replicas, tokens, wave, layers, where.widths, scoring, skeleton)
            model.read(self._saved(where))
        self._continued = True
        return model

    def _write_candidates(
        self, model: ModelOnWorkers, state: State, candidates: dict[Letter, State], tuning: CandidateTuning
    ) -> None:
        """Build the candidates of an iteration and write them as checkpoints, as far as they are not there."""
        iteration = state.iteration + 1
        built = {letter: after for letter, after in candidates.items() if not tuning.written(iteration, letter)}
        label, parts = f"candidates of iteration {iteration}", self._parts(model, built, scored=False)
        narrower = next((after for letter, after in built.items() if letter != "L"), None)
        with self.clock.phase("search"), self.reporter.step(label, parts) as step:
            rule = self.recipe.depth_rule if "L" in built else None
            shorter, _ = model.candidates(rule, narrower.widths if narrower else None, None, step)
            self._account(model)
        for letter, after in built.items():
            folder = self._folder(tuning.place(iteration, letter))
            if letter == "L":
                assert shorter is not None
                layers = tuple(layer for layer in model.layers if layer != shorter.layer)
                self._write(model, folder, layers=layers)
            else:
                self._write(model, folder, widths=after.widths)

    def _tune(self) -> None:
        """Tune and score the candidates that were written; no workers are there."""
        assert self.tuning is not None
        where = self._where()
        candidates = list(self.path_plan.candidates(where))
        self.tuning.tune(where.iteration + 1, candidates, self.prepared.calibration, self.reporter, self.clock)

    def _iterate(self, model: ModelOnWorkers, state: State, candidates: dict[Letter, State]) -> State:
        """Build and score candidates, adopt one, and record it."""
        chosen, criterion = self.path_plan.choice(state, candidates), self._criterion
        tuned = self.tuning.known[state.iteration + 1] if self.tuning else None
        if tuned:
            chosen, criterion = chosen or best_letter("perplexity", tuned.after, state.iteration + 1), None
        built = candidates if criterion else {letter: candidates[letter] for letter in (chosen,) if letter}
        label, parts = f"iteration {state.iteration + 1}", self._parts(model, built, criterion is not None)
        with self.clock.phase("search"), self.reporter.step(label, parts) as step:
            rule = self.recipe.depth_rule if "L" in built else None
            narrower = next((after for letter, after in built.items() if letter != "L"), None)
            shorter, scores = model.candidates(rule, narrower.widths if narrower else None, criterion, step)
            if chosen is None:
                assert criterion is not None
                chosen = best_letter(criterion, scores, state.iteration + 1)
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
            shape=shape_of(reshaped(self.prepared.skeleton.config, after.widths, model.layers)),
            removed=self.path_plan.share(after),
            scores=tuned.after if tuned else scores,
            untuned=tuned.before if tuned else None,
        )
        if self.path_plan.kept(state, after):
            entry.folder = kept_folder(after.iteration)
            self._write(model, self._folder(entry.folder))
        self._record(model, entry)
        self.reporter.events.emit("iteration", iteration=entry.iteration, step=entry.step, **self._progress(entry))
        self.reporter.say(_line(entry))
        return after

    def _train(self, model: ModelOnWorkers, where: State) -> None:
        """Train and write the layers of the model that the path has led to, as far as they are not there yet."""
        prepared, skeleton = self.prepared, self.prepared.skeleton
        journal = self._written(model.layers)
        training = Training(
            steps=self.recipe.reconstruct,
            saved=Saved(prepared.placement.out, where.widths, model.layers),
            finished={model.layers[place] for place in journal.finished()},
            originals=self.path_plan.start.layers,
            projections=skeleton.family.kinds[0].projections,
        )
        layout, waves = model.scorer(model.all).layout, prepared.calibration_waves(model.replicas)
        with self.clock.phase("train"), self.reporter.step("train", training.parts(waves)) as step:
            train_layers(model.all, layout, waves, training, step)
            self._account(model)
        self.state.learn(digests(model.group, layout))

    def _record(self, model: ModelOnWorkers, entry: Iteration) -> None:
        """Make an iteration a finished one: layers that became narrower are saved, then the path says so."""
        saved = self.state.known.saved
        if entry.step != "L":
            saved = entry.folder or f"{SAVED}{entry.iteration:02d}"
            if entry.folder is None:
                model.write(self._folder(saved), range(self.path_plan.start.layers))
        self.state.known.saved = saved
        self.state.known.path.append(entry)
        self.state.save()
        self.remove_saved()

    def remove_saved(self) -> None:
        """Remove saved layers of iterations that are no longer the last with narrower layers."""
        for name in self.journal.folder.names():
            if name.startswith(SAVED) and name != self.state.known.saved:
                self.journal.folder.remove_folder(name)
        if self.tuning:
            going = self.state.previous is None and bool(self.path_plan.candidates(self._where()))
            self.tuning.remove(self._where().iteration + 1 if going else None)

    def _check_saved(self) -> None:
        """Check that the layers from which an attempt goes on are what was written.

        Raises:
            InputError: they are not, and nothing leads back to them.
        """
        saved = self._saved(self._where())
        if not self.state.resumed or saved is None:
            return
        journal = Journal(saved.folder, self.journal.fingerprint, len(saved.layers))
        left = set(self._layers())  # some may have gone since then
        for place in (place for place, layer in enumerate(saved.layers) if layer in left):
            if fault := journal.fault(place):
                raise InputError("out", f"{saved.folder} is not whole: {fault}; choose an empty directory")

    def _finish(self) -> Result:
        """Write the result last."""
        prepared, recipe, where = self.prepared, self.recipe, self._where()
        config = prepared.skeleton.config
        after = reshaped(config, where.widths, self._layers())
        size = ModelSize(
            parameters_before=prepared.skeleton.parameters(), parameters_after=Skeleton(after, "cpu").parameters()
        )
        assert size.parameters_before - size.parameters_after == where.removed, "not what the path removes"
        seconds, workers = costs(self.clock, self.workers, self.state.previous)
        result = self.state.finish(
            Result(
                command=recipe.command,
                fingerprint=self.journal.fingerprint,
                recipe=prepared.record(),
                model=size,
                calibration=prepared.calibration_result(),
                structure=Structure(
                    before=shape_of(config),
                    after=shape_of(after),
                    removed=size.removed,
                    kept=self._layers(),
                    path=self.state.known.path,
                    improvements=self._improvements(),
                ),
                perplexity=self.state.perplexities(),
                seconds=seconds,
                workers=workers,
                restarts=self.state.known.restarts,
            ),
            kept=[entry.folder for entry in self.state.known.path if entry.folder],
        )
        self.state.known.saved = None
        self.remove_saved()
        return result

    def _improvements(self) -> list[ImprovementResult] | None:
        """Return the trainings of the layers that are left."""
        return improvements_of([record for _, record in sorted(self._written(self._layers()).finished().items())])

    # -- what is known ----------------------------------------------------------------------------------------

    @property
    def _criterion(self) -> Criterion | None:
        """The criterion that scores candidates; None if the path is known and scores are not asked for."""
        known = self.recipe.path is not None or self.recipe.criterion == "random"
        return None if known and not self.recipe.scores else self.recipe.scored_by

    def _where(self) -> State:
        """Return the state after the finished iterations."""
        state = self.path_plan.start
        for entry in self.state.known.path:
            state = state.after(entry.step, self.path_plan.request)
        return state

    def _layers(self, iterations: int | None = None) -> list[int]:
        """The layers that the finished iterations have left, or the first ones of them."""
        gone = {entry.layer for entry in self.state.known.path[:iterations]}
        return [index for index in range(self.path_plan.start.layers) if index not in gone]

    def _written(self, layers: Sequence[int]) -> Journal:
        """Return the journal of the model that the output has in the end, whose layers these are."""
        place = self.prepared.checkpoint.place
        return Journal(self.prepared.placement.out, self.journal.fingerprint, len(layers), place)

    def _folder(self, name: str) -> str:
        return f"{self.prepared.placement.out}/{name}"

    def _saved(self, where: State) -> Saved | None:
        """Return the folder of the current layers: a finished run's output, or saved ones; None for the checkpoint."""
        if self.state.previous:
            return Saved(self.prepared.placement.out, where.widths, tuple(self._layers()))
        known = self.state.known
        if known.saved is None:
            return None
        saved = range(self.path_plan.start.layers)
        kept = next((entry.iteration for entry in known.path if entry.folder == known.saved), None)
        layers = saved if kept is None else self._layers(kept)
        return Saved(self._folder(known.saved), where.widths, tuple(layers))

    def _progress(self, entry: Iteration) -> dict[str, float]:
        """The share of the parameters that an iteration has left removed, and of the request where there is one."""
        done = {"removed": entry.removed}
        return done | ({"share": min(1.0, entry.removed / self.recipe.remove)} if self.recipe.remove else {})

    def _parts(self, model: ModelOnWorkers, built: dict[Letter, State], scored: bool) -> int:
        """The number of parts that an iteration reports to its progress step."""
        parts, layers = 0, len(model.layers)
        for letter in built:
            if letter == "L":
                passes = {"third-last": 0, "cosine": 1, "perplexity": layers}[self.recipe.depth_rule]
                again = scored and not (self.recipe.depth_rule == "perplexity" == self._criterion)
                parts += model.waves_of(model.shortening) * (passes + again)
            else:
                parts += model.parts_to_narrow() + scored * model.waves_of(model.narrowing)
        return parts

    def _refer_parts(self, model: ModelOnWorkers) -> int:
        teams = {team.members: team for team in (model.narrowing, model.shortening)}
        return sum(model.waves_of(team) for team in teams.values())

    def _account(self, model: ModelOnWorkers) -> None:
        """Record what the workers have done since the last time."""
        account(model.group, model.scorer(model.all).layout, range(model.shards), self.reporter.events.emit)

    # -- what is kept -----------------------------------------------------------------------------------------

    def _measure(self, model: ModelOnWorkers, when: When) -> None:
        """Measure perplexity on every source on which it is not known."""
        for source, windows in self.state.missing(when):
            scorer = model.scorer(model.all, windows)
            label, parts = f"perplexity {when}", len(scorer.waves.all)
            with self.clock.phase("evaluate"), self.reporter.step(label, parts) as step:
                (value,) = scorer.scores("perplexity", [None], "dense", step)
            self._account(model)
            self.state.keep(source, when, value)

    def _write(
        self,
        model: ModelOnWorkers,
        folder: str,
        written: bool = False,
        layers: Sequence[int] | None = None,
        widths: Widths | None = None,
    ) -> None:
        """Write the current model as an ordinary checkpoint, its layers unless they are `written`; or a candidate, with
        fewer `layers` or other `widths`."""
        checkpoint, layers = self.prepared.checkpoint, model.layers if layers is None else layers
        journal = Journal(folder, self.journal.fingerprint, len(layers), checkpoint.place)
        if not written:
            model.write(folder, layers, "dense" if widths is None else "narrowed")
        self._account(model)
        with self.clock.phase("write"):
            write_frame(checkpoint, self.prepared.skeleton, journal)
            write_index(checkpoint, journal, changes(self.prepared.skeleton.config, widths or model.widths, layers))
        journal.folder.remove_partial()  # of workers that died while they wrote


def _line(entry: Iteration) -> str:
    """An iteration in one line."""
    shape, scores = entry.shape, ", ".join(f"{letter} {score:.4f}" for letter, score in entry.scores.items())
    what = f"layer {entry.layer} goes" if entry.step == "L" else f"{shape.groups} groups, {shape.neurons} neurons"
    parts = [f"iteration {entry.iteration}: {entry.step}", what, f"{entry.removed:.4f} removed", scores]
    return "; ".join(part for part in parts if part)
