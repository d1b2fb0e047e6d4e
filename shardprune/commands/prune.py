"""The story of `shardprune prune` and `shardprune rebuild`, from top to bottom."""

from contextlib import closing
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.error_curves import differentiate, measure, parts_of_curves
from shardprune.cluster.group import Backend, Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.observing import Observation, observe
from shardprune.cluster.passes import Waves, digests, load, parts_of_pass, perplexity, usage
from shardprune.cluster.pending_work import PendingWork
from shardprune.cluster.pruning import prune_segments
from shardprune.cluster.restarts import Attempts
from shardprune.commands.composite import claim_output, second_recipe
from shardprune.commands.prepare import prepare, settled
from shardprune.commands.prepared import Prepared
from shardprune.commands.pushing import pushed
from shardprune.commands.state import RunState, When, costs, with_peaks_of
from shardprune.model.allocation_file import AllocatedShare, AllocationFile, written
from shardprune.model.left_dense import left_dense
from shardprune.model.pruning_job import Zeroing
from shardprune.model.saving import write_frame, write_index
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.report.achieved import removal_of, sparsity_of, structure_of, zeros_of
from shardprune.report.clock import Clock
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import ModelSize, Result, Sparsity, Structure
from shardprune.shard.layers import Version
from shardprune.shard.narrowed_layers import skeleton_of_widths
from shardprune.solvers.error_curves import levels_around
from shardprune.solvers.methods import Effort
from shardprune.storage.locations import absolute
from shardprune.storage.output_names import ALLOCATION
from shardprune.storage.owner import owned
from shardprune.storage.records import LayerRecord

NARROWED = "structured"  # folder of an output that holds the model before its weights become zero

STEPS = ("before", "prune", "after")  # of a run; perplexity is measured before and after


@pushed
def prune(recipe: PruneRecipe, reporter: Reporter | None = None) -> Result:
    """Prune a model as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same run unfinished, only what is missing is done.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        SolverError: a projection cannot be solved.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    clock = Clock(reporter.events)
    with closing(backend_of(recipe)) as backend:
        if recipe.structured is not None and recipe.zeroes:
            result = _prune_composite(recipe, backend, reporter, clock)
        else:
            with clock.phase("plan"):
                prepared = prepare_first(recipe, backend)
            run = PruningRun(prepared, backend, reporter, clock)
            result = run.state.done(reporter) or run.go()
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


def prepare_first(recipe: PruneRecipe, backend: Backend) -> Prepared:
    """Prepare the first run of a recipe: the only one, or the one that removes structures before weights become zero.

    Raises:
        InputError: something cannot work; nothing has been written then.
    """
    if recipe.structured is None:
        return prepare(recipe, backend)
    if not recipe.zeroes:
        return prepare(recipe.structures, backend)
    out = absolute(recipe.out)
    first = prepare(recipe.structures.model_copy(update={"out": f"{out}/{NARROWED}"}), backend, claimed=out)
    assert first.widths is not None
    settled(recipe, skeleton_of_widths(first.skeleton, first.widths, recipe.ignore))  # of which the second run is
    return first


@pushed
def rebuild(recipe: RebuildRecipe, reporter: Reporter | None = None) -> Result:
    """Rebuild the masks of a pruned model with the help of its dense original; results and errors are those of
    `prune`."""
    reporter = reporter or Reporter()
    clock = Clock(reporter.events)
    with closing(backend_of(recipe)) as backend:
        with clock.phase("plan"):
            prepared = prepare(recipe, backend)
        run = PruningRun(prepared, backend, reporter, clock)
        result = run.state.done(reporter) or run.go()
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


def _prune_composite(recipe: PruneRecipe, backend: Backend, reporter: Reporter, clock: Clock) -> Result:
    """Remove structures, then make weights of the rest zero: two runs, each with its own layer files.

    The first one's output lies in a folder of the second one's until that is finished.
    """
    with clock.phase("plan"):
        first = prepare_first(recipe, backend)
        claim = claim_output(recipe, first)
    result = claim.done(reporter)
    if result is None:
        folder = claim.journal.folder
        with owned(folder), reporter.events.recorded(folder, **first.facts()):
            if claim.previous:  # finished, but asked to be measured on more
                measuring = PruningRun(first, backend, reporter, clock, ("before",))
                for attempt in measuring.attempts():
                    with attempt as layout:
                        measuring.attempt(layout)
                model, narrowed = absolute(recipe.out), claim.previous
                narrowed.perplexity = measuring.state.perplexities()
            else:
                with clock.phase("structure"):
                    removing = PruningRun(first, backend, reporter, Clock(reporter.events), STEPS[:-1])
                    model, narrowed = first.placement.out, removing.state.done(reporter) or removing.go()
            with clock.phase("plan"):
                second = prepare(second_recipe(recipe, first, model), backend, first)
            result = PruningRun(second, backend, reporter, clock, narrowed=narrowed).go()
    claim.journal.folder.remove_folder(NARROWED)
    return result


class PruningRun:
    """One run over as many attempts as it takes; each goes on from the layers that are finished.

    Args:
        steps: those of `STEPS` that are done.
        narrowed: the result of the run that removed structures before.
    """

    def __init__(
        self,
        prepared: Prepared,
        backend: Backend,
        reporter: Reporter,
        clock: Clock,
        steps: tuple[str, ...] = STEPS,
        narrowed: Result | None = None,
    ) -> None:
        self.prepared, self.steps, self.narrowed = prepared, steps, narrowed
        self.backend, self.reporter, self.clock = backend, reporter, clock
        self.journal = prepared.journal
        self.state = RunState(
            prepared.journal, prepared.earlier, prepared.record(), prepared.evaluations, prepared.inputs
        )
        if narrowed:
            self.state.adopt(narrowed)
        self.workers: list[dict[str, Any]] = []  # what each says of itself

    def go(self) -> Result:
        """Carry out the run in its output, and return its result."""
        with self.state.running(self.reporter, **self.prepared.facts()):
            asked, there = self.prepared.recipe.asked.workers, self.prepared.layout.workers
            if there < asked:
                self.reporter.say(
                    f"{asked} workers were asked for; the run goes on with {there}, for which there are slots"
                )
            threads, wanted = self.prepared.placement.workers.threads, self.prepared.recipe.threads
            if wanted and wanted != threads:
                self.reporter.say(f"threads: the run keeps {threads} for each worker, with which it began")
            if line := left_dense(self.prepared.skeleton.family.kinds):
                self.reporter.say(line)
            if self.state.resumed:
                self.journal.remove_damaged(self.reporter.say)
            if self.state.previous is None:
                self._complete_text()
            for attempt in self.attempts():
                with attempt as layout:
                    self.attempt(layout)
            return self._finish()

    def _complete_text(self) -> None:
        """Let the model write its calibration text, where it is to."""
        restarts = self.prepared.recipe.max_restarts
        self.prepared.text.complete(self.state, restarts, self.backend, self.reporter, self.clock)

    def attempts(self) -> Attempts[Layout]:
        """Return attempts on the workers that there are, until one ends without losing any."""
        prepared, restarts = self.prepared, self.prepared.recipe.max_restarts
        device = prepared.placement.workers.device
        return Attempts(prepared.layout, device, restarts, self.backend, self.reporter, self.state.lost)

    def attempt(self, layout: Layout) -> None:
        """Measure, observe, prune, measure again: whatever of it is not yet done."""
        prepared, layers = self.prepared, self.prepared.skeleton.layers
        finished = set(self.journal.finished())
        placed = {"shards": len(layout.shards), "replicas": layout.replicas}
        self.reporter.events.emit("attempt", finished=sorted(finished), **placed)
        if finished:
            self.reporter.say(f"{len(finished)} of {layers} layers are finished already")
        with self.clock.phase("load"):
            group = self._start(layout, finished)
        with closing(group):
            self.state.learn(digests(group, layout))
            if "before" in self.steps:
                self._measure(group, layout, "before", "given" if prepared.job.sparse else "dense")
                self.state.learn(digests(group, layout))
            if "prune" in self.steps and len(finished) < layers:
                self._measure_curves(group, layout)
                waves = prepared.calibration_waves(layout.replicas)
                self._observe(group, layout, waves, finished)
                work = self._work(finished)
                seen, held_out = len(waves.calibrating.all), len(waves.held_out.all)
                parts = work.parts(layout.segments, seen, waves.tokens_of_one, held_out)
                with self.clock.phase("prune"), self.reporter.step(prepared.recipe.command, parts) as step:
                    prune_segments(group, layout, waves, work, step)
            if "after" in self.steps:
                self._measure(group, layout, "after", "latest")
            self.workers = usage(group, layout)

    def _start(self, layout: Layout, finished: set[int]) -> Group:
        """Start workers, which hold their layers where these are not streamed."""
        prepared = self.prepared
        kept = prepared.kept_bytes(layout.replicas, streams=max(len(lane) for lane in layout.lanes()))
        specs = prepared.worker_specs(layout, finished, max(kept, prepared.curve_bytes(layout)))
        group = self.backend.start(specs, prepared.store_bytes(self._sent_bytes()))
        try:
            if not prepared.streamed:
                dense_first = "before" in self.steps and any(True for _ in self.state.missing("before"))
                load(group, layout, "given" if prepared.job.sparse and dense_first else "latest")
        except BaseException:
            group.close()
            raise
        return group

    def _sent_bytes(self) -> int:
        """Return the bytes of what the replicas of a shard send each other for a layer: solved projections, the squared
        gradients of the block whose masks are rebuilt, and the differences by which an input misses its target."""
        prepared, replicas = self.prepared, self.prepared.layout.replicas
        if replicas == 1:
            return 0
        gradients = 0
        differences = 0
        for kind, shapes in zip(prepared.skeleton.family.kinds, prepared.shapes, strict=True):
            if prepared.job.rebuilding:
                sizes = {name: rows * cols for name, (rows, cols) in shapes.items()}
                blocks = [sum(sizes[name] for name in names) for names in kind.blocks.values()]
                gradients = max(gradients, *((replicas - 1) * 4 * size for size in blocks))
            if prepared.job.improving.stream_targets:
                for name in kind.input_names:
                    rows, cols = shapes[name]
                    missed = cols * (rows if name in kind.outputs else cols)
                    differences = max(differences, (replicas - 1) * 4 * missed)
        return prepared.layer_bytes + gradients + differences

    def _observe(self, group: Group, layout: Layout, waves: Waves, finished: set[int]) -> None:
        """Send dense waves through, where something is decided by them that is not known yet: what enters the segments
        of parallel propagation, and the outlier ratios that an allocation looks at."""
        prepared, known = self.prepared, self.state.known
        starts = tuple(part.start for part in layout.segments if part.start and not finished.issuperset(part))
        observation = Observation(starts, None if known.outliers else prepared.job.observed_m)
        if not observation:
            return
        parts = observation.parts(layout, waves, prepared.streamed)
        with self.clock.phase("observe"), self.reporter.step("observe", parts) as step:
            inputs = [kind.input_names for kind in prepared.skeleton.family.kinds]
            found = observe(group, layout, waves, observation, inputs, prepared.streamed, step)
        self.state.learn(digests(group, layout))
        known.outliers = known.outliers or found
        self.state.save()
        if observation.outlier_m is not None and len({layer.layer for layer in found}) == 1:
            self.reporter.say("the layers' outlier ratios do not differ")

    def _measure_curves(self, group: Group, layout: Layout) -> None:
        """Measure the error curves of all projections, where an allocation shares them out and they are not known."""
        prepared, known, zeroing = self.prepared, self.state.known, self.prepared.job.zeroing
        if not isinstance(zeroing, Zeroing) or not zeroing.measures:
            return
        target = zeroing.of_rest(prepared.removed)
        levels = levels_around(target)
        places = {(layer, name) for layer, own in enumerate(prepared.shapes) for name in own}
        whole = {
            (share.layer, share.name) for share in known.curves if [level for level, _ in share.curve or ()] == levels
        }
        if whole == places or target == 0:  # where structures have met the target alone
            return
        waves, family = prepared.curve_waves(layout.replicas), prepared.skeleton.family
        parts = parts_of_curves(waves, family, prepared.streamed)
        with self.clock.phase("curves"), self.reporter.step("curves", parts) as step:
            differentiate(group, layout, waves, prepared.streamed, step)
            found = measure(group, layout, waves, family, prepared.shapes, levels, zeroing.damping_of_curves, step)
        self.state.learn(digests(group, layout))
        known.curves = [AllocatedShare(*place, curve=tuple(curve)) for place, curve in sorted(found.items())]
        self.state.save()

    def _work(self, finished: set[int]) -> PendingWork:
        """Return what is left to be done to the layers."""
        prepared, outliers = self.prepared, self.state.known.outliers
        curves = {(share.layer, share.name): share.curve for share in self.state.known.curves if share.curve}
        scoring = prepared.job.scoring
        return PendingWork(
            shares=prepared.shares(outliers, curves),
            finished=frozenset(finished),
            family=prepared.skeleton.family,
            shapes=prepared.shapes,
            layer_outliers=[layer.layer for layer in outliers],
            rebuilding=prepared.job.rebuilding,
            measure_error=prepared.job.measure_error,
            widths=prepared.widths,
            passes_on_dense=scoring is not None and not scoring.correction and not prepared.job.improving,
            effort=Effort(sweeps=scoring.needs_gram(False)) if scoring else prepared.job.effort,
            improving=prepared.job.improving,
            chunks=prepared.recipe.asked.chunks,
        )

    def _measure(self, group: Group, layout: Layout, when: When, version: Version) -> None:
        """Measure perplexity on every source on which it is not known."""
        prepared = self.prepared
        for source, windows in self.state.missing(when):
            waves = Waves(windows, layout.replicas, prepared.wave)
            parts = parts_of_pass(waves, prepared.skeleton.layers, prepared.streamed)
            with self.clock.phase("evaluate"), self.reporter.step(f"perplexity {when}", parts) as step:
                value = perplexity(group, layout, waves, version, prepared.streamed, step)
            self.state.keep(source, when, value)

    def _finish(self) -> Result:
        """Write what makes the layer files a checkpoint, and the result last."""
        prepared, state = self.prepared, self.state
        self.journal.folder.remove_partial()  # of workers that died while they wrote
        if state.previous is None:
            with self.clock.phase("write"):
                write_frame(prepared.checkpoint, prepared.skeleton, self.journal)
                write_index(prepared.checkpoint, self.journal, prepared.config_changes)
        records = [record for _, record in sorted(self.journal.finished().items())]
        if state.previous is None and any(record.projections for record in records):
            self.journal.folder.write_text(ALLOCATION, written(AllocationFile.of(records, self.state.known.curves)))
        size = ModelSize(
            parameters_before=prepared.parameters_before,
            parameters_after=prepared.parameters_after,
            zeros_after=zeros_of(records),
        )
        seconds, workers = costs(self.clock, self.workers, state.previous)
        if self.narrowed:
            workers = with_peaks_of(workers, self.narrowed.workers)
        return state.finish(
            Result(
                command=prepared.recipe.command,
                fingerprint=self.journal.fingerprint,
                recipe=prepared.record(),
                model=size,
                calibration=state.previous.calibration if state.previous else prepared.calibration_result(),
                sparsity=removal_of(records, prepared.job.target) if prepared.widths else self._sparsity(records),
                structure=self._structure(size, records),
                perplexity=state.perplexities(),
                seconds=seconds,
                workers=workers,
                restarts=state.known.restarts,
            )
        )

    def _sparsity(self, records: list[LayerRecord]) -> Sparsity:
        prepared = self.prepared
        sparsity = sparsity_of(records, prepared.job.target, prepared.weights_before if prepared.base else None)
        if self.narrowed is None or self.narrowed.sparsity is None:
            return sparsity
        return sparsity.model_copy(update={"before": self.narrowed.sparsity.before})  # of the model before both runs

    def _structure(self, size: ModelSize, records: list[LayerRecord]) -> Structure | None:
        if self.prepared.widths:
            return structure_of(self.prepared.skeleton.config, self.prepared.widths, size, records)
        return self.narrowed.structure if self.narrowed else None
