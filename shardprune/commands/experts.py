"""The story of `shardprune experts`: one pass over the dense model says what its experts do, then every layer is copied
without those that matter least."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from math import prod
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.expert_propagation import Training, parts_of_removal, remove_in_turn
from shardprune.cluster.expert_statistics import Observed, parts_of_statistics, routed_statistics, weight_ratios
from shardprune.cluster.expert_writing import write_layers
from shardprune.cluster.group import Backend, Group
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, digests, parts_of_pass, perplexity, usage
from shardprune.cluster.restarts import Attempts
from shardprune.commands.prepare import prepare
from shardprune.commands.prepared import Prepared
from shardprune.commands.pushing import pushed
from shardprune.commands.state import RunState, When, costs
from shardprune.model.expert_statistics import StatisticsFile, read_statistics
from shardprune.model.further_layers import FurtherLayers
from shardprune.model.saving import write_index
from shardprune.planning.workspaces import state_of_training
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.report.clock import Clock
from shardprune.report.experts_result import Experts, ExpertsOfLayer, ExpertTraining
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import ModelSize, Result
from shardprune.shard.expert_worker import ExpertWorker
from shardprune.shard.layers import Version
from shardprune.shard.spec import WorkerSpec
from shardprune.solvers.expert_merging import clusters
from shardprune.solvers.expert_scores import chosen, needs_pass
from shardprune.storage.output_names import EXPERTS
from shardprune.storage.records import KeptExperts, LayerRecord
from shardprune.storage.windows import tokens_hash


@pushed
def experts(recipe: ExpertsRecipe, reporter: Reporter | None = None) -> Result:
    """Remove experts of a model as a recipe says, and return what `result.json` in the output holds.

    Where the output holds the same run unfinished, only what is missing is done.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        SolverError: the experts' outputs are not finite.
        WorkerLost: workers died more than `max_restarts` times.
    """
    reporter = reporter or Reporter()
    clock = Clock(reporter.events)
    with closing(backend_of(recipe)) as backend:
        with clock.phase("plan"):
            prepared = prepare(recipe, backend)
        run = ExpertsRun(recipe, prepared, backend, reporter, clock)
        result = run.state.done(reporter) or run.go()
    if recipe.report:
        leave_report(recipe.out, reporter)
    return result


class ExpertsRun:
    """One run over as many attempts as it takes; each goes on from the statistics and the layers that are there."""

    def __init__(
        self, recipe: ExpertsRecipe, prepared: Prepared, backend: Backend, reporter: Reporter, clock: Clock
    ) -> None:
        assert prepared.fewer is not None
        self.recipe, self.prepared, self.fewer = recipe, prepared, prepared.fewer
        self.backend, self.reporter, self.clock = backend, reporter, clock
        self.journal = prepared.journal
        self.state = RunState(
            prepared.journal, prepared.earlier, prepared.record(), prepared.evaluations, prepared.inputs
        )
        self.statistics = StatisticsFile(1, prepared.checkpoint.identity())
        self.workers: list[dict[str, Any]] = []  # what each says of itself

    # -- the story --------------------------------------------------------------------------------------------

    def go(self) -> Result:
        """Carry out the run in its output, and return its result."""
        prepared, recipe = self.prepared, self.recipe
        with self.state.running(self.reporter, **prepared.facts()):
            if self.state.resumed:
                self.journal.remove_damaged(self.reporter.say)
            self.statistics = self._known_statistics()
            if self.state.previous is None and (recipe.improving or not self._scored):
                prepared.text.complete(self.state, recipe.max_restarts, self.backend, self.reporter, self.clock)
            device = prepared.placement.workers.device
            for attempt in Attempts(
                prepared.layout, device, recipe.max_restarts, self.backend, self.reporter, self.state.lost
            ):
                with attempt as layout:
                    self._attempt(layout)
            return self._finish()

    def _attempt(self, layout: Layout) -> None:
        """Measure, look at the experts, write, measure again: whatever of it is not yet done."""
        layers = self.prepared.skeleton.layers
        finished = set(self.journal.finished())
        placed = {"shards": len(layout.shards), "replicas": layout.replicas}
        self.reporter.events.emit("attempt", finished=sorted(finished), **placed)
        if finished:
            self.reporter.say(f"{len(finished)} of {layers} layers are finished already")
        with self.clock.phase("load"):
            group = self._start(layout, finished)
        with closing(group):
            self.state.learn(digests(group, layout))
            self._measure(group, layout, "before", "dense")
            if len(finished) < layers:
                if not self._scored and self.recipe.propagate == "dense":
                    self._observe(group, layout)
                if self.recipe.propagate == "pruned" or self.recipe.improving:
                    self._remove_in_turn(group, layout, finished)
                else:
                    self._write(group, layout, finished)
            self._measure(group, layout, "after", "latest")
            self.workers = usage(group, layout)

    def _start(self, layout: Layout, finished: set[int]) -> Group:
        """Start workers; they read layers when they first need them."""
        prepared = self.prepared
        kept = prepared.kept_bytes(layout.replicas, streams=1) if self.recipe.reads_text else 0
        specs = [self._with_memory(spec) for spec in prepared.worker_specs(layout, finished, kept)]
        return self.backend.start(specs, prepared.store_bytes(0), ExpertWorker)

    def _with_memory(self, spec: WorkerSpec) -> WorkerSpec:
        """Return what a worker must know, with the bytes of the layers that it holds: all, or one and the next; where
        layers are trained, also of the largest as it is cut, and of its training."""
        stored, itemsize = self.prepared.skeleton, self.prepared.placement.dtype.itemsize
        sizes = [itemsize * sum(map(prod, stored.layer_tensors(index).values())) for index in spec.layers]
        held = sorted(sizes)[-2:] if self.prepared.streamed else sizes
        trained = 0
        if self.recipe.improving:
            weights = max(sum(rows * cols for rows, cols in layer.values()) for layer in self.prepared.shapes)
            trained = max(sizes) + (state_of_training(itemsize) + 1 + itemsize) * weights
        return replace(spec, other_bytes=sum(held) + trained)

    def _observe(self, group: Group, layout: Layout) -> None:
        """Find out what the score looks at: tokens that pass through the dense model, or weights."""
        prepared, layers = self.prepared, self.fewer.mixture.layers
        if needs_pass(self.recipe.score):
            waves = Waves(prepared.calibration, layout.replicas, prepared.wave)
            parts = parts_of_statistics(waves, layers, prepared.streamed)
            with self.clock.phase("observe"), self.reporter.step("observe", parts) as step:
                found = routed_statistics(group, layout, waves, layers, prepared.streamed, self.recipe.merge, step)
            self.statistics = replace(self.statistics, tokens_sha256=tokens_hash(prepared.calibration))
            self._know(found)
        else:
            with self.clock.phase("observe"), self.reporter.step("observe", len(layers)) as step:
                self.statistics = replace(self.statistics, ratios=weight_ratios(group, layout, layers, step))
        self.state.learn(digests(group, layout))
        self.journal.folder.write_text(EXPERTS, self.statistics.written())

    def _write(self, group: Group, layout: Layout, finished: set[int]) -> None:
        """Write the layers that are not there yet."""
        layers = range(self.prepared.skeleton.layers)
        records = {index: self._record(index) for index in layers if index not in finished}
        with self.clock.phase("remove"), self.reporter.step("remove experts", len(records)) as step:
            write_layers(group, layout, records, step)
        self.state.learn(digests(group, layout))

    def _remove_in_turn(self, group: Group, layout: Layout, finished: set[int]) -> None:
        """Look at the experts of each layer behind those that are cut, where they are not known, train what it keeps
        where that is asked for, and write it then."""
        prepared, mixture, recipe = self.prepared, self.fewer.mixture, self.recipe
        waves = prepared.calibration_waves(layout.replicas)
        unknown: set[int] = set()
        if recipe.propagate == "pruned":
            tokens = tokens_hash(prepared.calibration)
            self.statistics = replace(self.statistics, propagated="pruned", tokens_sha256=tokens)
            unknown = mixture.layers.keys() - self.statistics.routed.keys()
        steps = {"router": recipe.router_kd, "reconstruction": recipe.reconstruct}
        steps = {name: count for name, count in steps.items() if count}

        def names(step: str, index: int) -> tuple[str, ...]:
            return self.fewer.routers(index) if step == "router" else self.fewer.reduced.family.kinds[index].projections

        def learn(index: int, own: Observed) -> None:
            self._know({index: own})
            self.state.learn(digests(group, layout))
            self.journal.folder.write_text(EXPERTS, self.statistics.written())

        trained = mixture.layers.keys() - finished
        parts = parts_of_removal(waves, layout, finished, unknown, trained, len(steps))
        training = Training(steps, names) if steps else None
        with self.clock.phase("remove"), self.reporter.step("remove experts", parts) as step:
            remove_in_turn(group, layout, waves, finished, unknown, recipe.merge, learn, self._record, training, step)
        self.state.learn(digests(group, layout))

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
        prepared, state, fewer = self.prepared, self.state, self.fewer
        self.journal.folder.remove_partial()  # of workers that died while they wrote
        if state.previous is None:
            with self.clock.phase("write"):
                FurtherLayers(fewer).write(self.journal, self._kept()[max(fewer.mixture.layers)])
                write_index(fewer.stored, self.journal, fewer.changes)
        size = ModelSize(parameters_before=prepared.skeleton.parameters(), parameters_after=fewer.reduced.parameters())
        seconds, workers = costs(self.clock, self.workers, state.previous)
        calibration = prepared.calibration_result() if self.recipe.reads_text and not state.previous else None
        return state.finish(
            Result(
                command=self.recipe.command,
                fingerprint=self.journal.fingerprint,
                recipe=prepared.record(),
                model=size,
                calibration=state.previous.calibration if state.previous else calibration,
                experts=self._result(),
                perplexity=state.perplexities(),
                seconds=seconds,
                workers=workers,
                restarts=state.known.restarts,
            )
        )

    # -- what is known ----------------------------------------------------------------------------------------

    @property
    def _scored(self) -> bool:
        """Whether what the score looks at is known."""
        return self.statistics.has_scores(self.recipe.score, self.fewer.mixture.layers)

    def _know(self, found: Mapping[int, Observed]) -> None:
        """Add what was seen of the experts of some layers to the statistics."""
        routed = {layer: own.routed for layer, own in found.items()}
        apart = {layer: own.apart for layer, own in found.items() if own.apart is not None}
        known = self.statistics
        self.statistics = replace(known, routed=known.routed | routed, distances=known.distances | apart)

    def _known_statistics(self) -> StatisticsFile:
        """Return what an earlier attempt has left, or the statistics that are given."""
        folder = self.journal.folder
        if folder.is_file(EXPERTS):
            return read_statistics(folder, self.statistics.model, self.fewer.mixture)
        if self.prepared.statistics:
            folder.write_text(EXPERTS, self.prepared.statistics.written())
            return self.prepared.statistics
        return self.statistics

    def _protected(self) -> dict[int, frozenset[int]]:
        known = self.recipe.protect and self.recipe.propagate == "dense"  # else not before the last layer
        return self.statistics.super_experts() if known else {}

    def _kept(self) -> dict[int, KeptExperts]:
        """Return the experts that each layer keeps."""
        protected, scores = self._protected(), self.statistics.scores(self.recipe.score)
        return {layer: self._kept_of(layer, own, protected.get(layer, frozenset())) for layer, own in scores.items()}

    def _kept_of(self, layer: int, scores: list[float], protected: frozenset[int]) -> KeptExperts:
        """Return the experts that a layer keeps by the scores of all."""
        count, mixture = self.fewer.kept, self.fewer.mixture
        if not self.recipe.merge:
            return KeptExperts(chosen(scores, count, mixture.groups, protected), mixture.experts)
        tokens = self.statistics.routed[layer].tokens
        found = clusters(self.statistics.distances[layer], scores, count, mixture.groups, protected)
        weights = [[tokens[expert] for expert in members] for members in found.values()]
        return KeptExperts(
            tuple(found),
            mixture.experts,
            tuple(found.values()),
            tuple(tuple(own) if any(own) else (1,) * len(own) for own in weights),
        )

    def _record(self, index: int) -> LayerRecord:
        """Return the record of a layer that is to be written, whose statistics are known."""
        return LayerRecord(index, experts=self._kept().get(index))

    def _result(self) -> Experts:
        """Return what the result says of the experts."""
        fewer, kept, protected = self.fewer, self._kept(), self._protected()
        records = self.journal.finished()
        scores, routed = self.statistics.scores(self.recipe.score), self.statistics.routed
        layers = [
            ExpertsOfLayer(
                layer=layer,
                kept=list(own.kept),
                members=[list(members) for members in own.members] or None,
                protected=sorted(protected.get(layer, ())),
                scores=scores[layer],
                tokens=list(routed[layer].tokens) if layer in routed else None,
                lost=routed[layer].lost(own.kept) if layer in routed and not own.members else None,
                trained=[
                    ExpertTraining(**{name: getattr(step, name) for name in ExpertTraining.model_fields})
                    for step in records[layer].improvements
                ],
            )
            for layer, own in kept.items()
        ]
        return Experts(
            before=fewer.mixture.experts,
            after=fewer.kept,
            per_token=fewer.mixture.per_token,
            score=self.recipe.score,
            active_before=fewer.active(fewer.skeleton),
            active_after=fewer.active(fewer.reduced),
            layers=layers,
        )
