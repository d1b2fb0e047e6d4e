"""The current model of `mop` on its workers: candidates are built and scored, and one of them is adopted.

If a shard has several replicas, half of them build and score the narrower candidate while the other half scores the
shallower one; otherwise the waves of both candidates go through the same workers, at different shards at a time.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardprune.cluster.group import Group, Ref, ReplicaSubset
from shardprune.cluster.layer_in_work import LayerInWork, turn_of
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, enter, hand_on, to_all
from shardprune.cluster.scoring import CandidateScorer
from shardprune.cluster.solution_parts import narrowing_parts
from shardprune.cluster.width_pruning import cut_layer, narrow_layer
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import Widths, reshaped
from shardprune.report.progress import Step
from shardprune.shard.current_layers import Saved
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.layers import Version
from shardprune.shard.mop_worker import MopWorker
from shardprune.shard.narrowed_layers import NarrowedLayers
from shardprune.shard.waves import split
from shardprune.signals import as_completed
from shardprune.solvers.methods import Effort
from shardprune.solvers.scoring import Criterion, Scoring
from shardprune.storage.records import LayerRecord

STREAM = "narrowing"
THIRD = -3  # the published rule: MoP always removes the third layer from the end


@dataclass(frozen=True)
class Shallower:
    """A candidate without one layer, and its `score` where candidates are scored."""

    layer: int
    score: float | None


class ModelOnWorkers:
    """The current model on the workers [shard][replica] of a group.

    Args:
        tokens: calibration windows [samples, seqlen]; `wave` of them move together.
        layers: the current ones, by their index in the checkpoint.
        scoring: how their structures are chosen.
        skeleton: of the original model.
    """

    def __init__(
        self,
        group: Group,
        shards: int,
        replicas: int,
        tokens: Tensor,
        wave: int,
        layers: Sequence[int],
        widths: Widths,
        scoring: Scoring,
        skeleton: Skeleton,
    ) -> None:
        self.group = group
        self.shards, self.replicas = shards, replicas
        self.tokens, self.wave = tokens, wave
        self.layers, self.widths, self.scoring = tuple(layers), widths, scoring
        self.skeleton, self.inputs = skeleton, skeleton.family.kinds[0].input_names
        halves = (range(0, replicas, 2), range(1, replicas, 2)) if replicas > 1 else (range(1), range(1))
        self.narrowing, self.shortening = (ReplicaSubset(group, members) for members in halves)
        self.all = ReplicaSubset(group, range(replicas))

    # -- scorers ----------------------------------------------------------------------------------------------

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each shard."""
        parts = split(len(self.layers), self.shards)
        return tuple(tuple(self.layers[part.start : part.stop]) for part in parts)

    def scorer(self, team: ReplicaSubset, tokens: Tensor | None = None) -> CandidateScorer:
        """Return a scorer of the current model that works with some replicas, on the calibration windows or others."""
        layout = Layout((), self.placement, len(team.members))
        waves = Waves(self.tokens if tokens is None else tokens, len(team.members), self.wave)
        return CandidateScorer(team, layout, waves)

    def waves_of(self, team: ReplicaSubset) -> int:
        """Return the number of calibration waves of some replicas."""
        return len(self.scorer(team).waves.all)

    # -- the model --------------------------------------------------------------------------------------------

    def read(self, saved: Saved | None) -> None:
        """Let the workers read the current layers, from the checkpoint or the files of an iteration."""
        self._wait(
            self.group.submit(shard, replica, MopWorker.read, layers, saved)
            for shard, layers in enumerate(self.placement)
            for replica in range(self.replicas)
        )

    def refer(self, step: Step) -> None:
        """Keep the outputs of the original model, which the workers have in memory now, on every last shard."""
        self.scorer(self.narrowing).refer(step)
        if self.replicas > 1:
            self.scorer(self.shortening).refer(step)

    def write(self, folder: str, layers: Sequence[int], version: Version = "dense") -> None:
        """Write those of the current layers that are in `layers` into a folder, each at the position that it has there.

        Args:
            version: `narrowed` for the narrower candidate's.
        """
        self._wait(
            self.narrowing.submit(
                shard, 0, MopWorker.write, folder, len(layers), layer, LayerRecord(layers.index(layer)), version
            )
            for shard, held in enumerate(self.placement)
            for layer in held
            if layer in layers
        )

    # -- candidates -------------------------------------------------------------------------------------------

    def shallower(self, rule: str, criterion: Criterion | None, step: Step) -> Shallower:
        """Return the candidate without the layer that a rule chooses.

        Args:
            criterion: that scores it; None for no score.
        """
        scorer, score = self.scorer(self.shortening), None
        if rule == "third-last":
            layer = self.layers[THIRD]
        elif rule == "cosine":
            means = scorer.angles(step)
            layer = max(self.layers, key=lambda index: means[index])
        else:
            perplexities = scorer.scores("perplexity", self.layers, "dense", step)
            least = min(perplexities)
            layer = self.layers[perplexities.index(least)]
            score = least if criterion == "perplexity" else None
        if criterion and score is None:
            (score,) = scorer.scores(criterion, [layer], "dense", step)
        return Shallower(layer, score)

    def narrower(self, widths: Widths, criterion: Criterion | None, step: Step) -> float | None:
        """Build the candidate with other widths beside the current model; return its score, if there is a criterion."""
        scorer = self.scorer(self.narrowing)
        if self.scoring.needs_gram(False):
            self._narrow_one_by_one(scorer, widths, step)
        else:
            scorer.gather(step)
            in_work = [
                LayerInWork(scorer.team, scorer.layout, scorer.waves, STREAM, index, step) for index in self.layers
            ]
            cuts = [cut_layer(layer, self.inputs, widths) for layer in in_work]
            for kept, refs in cuts:
                self._wait((kept, *refs))
                step.advance()
        return None if criterion is None else scorer.scores(criterion, [None], "narrowed", step)[0]

    def parts_to_narrow(self) -> int:
        """Return the number of parts of building the narrower candidate: passes of all waves through a layer (or the
        model), and the solutions of the layers."""
        layers, waves = len(self.layers), self.waves_of(self.narrowing)
        passes = 1
        if self.scoring.needs_gram(False):
            passes = 2 * layers - 1 if self.scoring.correction else layers
        return waves * passes + layers * self._solutions_of_a_layer(self.scorer(self.narrowing))

    def _solutions_of_a_layer(self, scorer: CandidateScorer) -> int:
        """Return the number of parts that making one layer narrower counts as."""
        current = Skeleton(reshaped(self.skeleton.config, self.widths), "cpu")
        effort = Effort(sweeps=self.scoring.needs_gram(False))
        return narrowing_parts(
            effort, current.family.kinds[0], current.projection_shapes(0), scorer.waves.tokens_of_one
        )

    def _narrow_one_by_one(self, scorer: CandidateScorer, widths: Widths, step: Step) -> None:
        """Make one layer after another narrower: the Gram matrices of all layers at once would not fit, and with
        correction each layer sees the outputs of the narrower ones before it."""
        layout, at, solutions = scorer.layout, 0, self._solutions_of_a_layer(scorer)
        enter(scorer.team, layout, scorer.waves, STREAM)
        for index in self.layers:
            while at < layout.shard_of(index):
                hand_on(scorer.team, layout, scorer.waves, STREAM, at)
                at += 1
            layer = LayerInWork(scorer.team, layout, scorer.waves, STREAM, index, step)
            narrow_layer(layer, self.inputs, widths, not self.scoring.correction)
            step.advance(solutions)
            if index != self.layers[-1] and self.scoring.correction:
                layer.over_waves(ForwardWorker.propagate, "narrowed", False)
        to_all(scorer.team, layout, at, ForwardWorker.drop, STREAM)

    def candidates(
        self, rule: str | None, widths: Widths | None, criterion: Criterion | None, step: Step
    ) -> tuple[Shallower | None, dict[str, float]]:
        """Build and score candidates, two of them at the same time; return the shallower one, and the scores that are
        asked for: `L` is the shallower one's, `G` the narrower one's.

        Args:
            rule: that chooses the layer to remove; None for no shallower candidate.
            widths: of the narrower candidate; None for no such one.
            criterion: what candidates are scored by; None where they are not.

        Raises:
            WorkerLost: a worker died. All workers are closed then, so that neither candidate goes on alone.
        """
        if rule is None or widths is None or not self.group.concurrent:
            shorter = None if rule is None else self.shallower(rule, criterion, step)
            score = None if widths is None else self.narrower(widths, criterion, step)
        else:
            with ThreadPoolExecutor(max_workers=2) as pool:
                first = pool.submit(self.shallower, rule, criterion, step)
                second = pool.submit(self.narrower, widths, criterion, step)
                try:
                    done: Iterable[Future[Any]] = as_completed((first, second))
                    for future in done:
                        future.result()
                except BaseException:
                    self.group.close()
                    raise
                shorter, score = first.result(), second.result()
        scores = {"L": shorter.score if shorter else None, "G": score}
        return shorter, {letter: value for letter, value in scores.items() if value is not None}

    # -- adopting one of them ---------------------------------------------------------------------------------

    def adopt_shallower(self, layer: int) -> None:
        """Remove the layer, and move others between shards so that these stay equally long."""
        self._on_all(MopWorker.discard_narrowed)
        for replica in range(self.replicas):
            self.group.get(self.group.submit(self._shard_of(layer), replica, MopWorker.remove, layer))
        before = {index: shard for shard, held in enumerate(self.placement) for index in held}
        self.layers = tuple(index for index in self.layers if index != layer)
        moves = [(index, before[index], self._shard_of(index)) for index in self.layers]
        for index, source, target in moves:
            if source != target:
                self._move(index, source, target)

    def adopt_narrower(self, widths: Widths) -> None:
        """Replace the current layers by the narrowed ones on all replicas."""
        self.widths = widths
        others = [replica for replica in range(self.replicas) if replica not in self.narrowing.members]
        self._wait(
            self.group.submit(shard, replica, NarrowedLayers.install_narrowed, layer, widths, choice)
            for shard, layers in enumerate(self.placement)
            for layer in (layers if others else ())
            for choice in [
                self.narrowing.submit(shard, turn_of(layer, len(self.narrowing.members)), NarrowedLayers.choice, layer)
            ]
            for replica in others
        )
        self._on_all(MopWorker.adopt)

    # -- inside -----------------------------------------------------------------------------------------------

    def _shard_of(self, layer: int) -> int:
        return next(shard for shard, held in enumerate(self.placement) if layer in held)

    def _move(self, layer: int, source: int, target: int) -> None:
        """Move a layer to another shard, from worker to worker."""
        self._wait(
            self.group.submit(
                target,
                replica,
                MopWorker.take_over,
                layer,
                self.widths,
                self.group.submit(source, replica, MopWorker.hand_over, layer),
            )
            for replica in range(self.replicas)
        )

    def _on_all(self, verb: Callable[..., None]) -> None:
        self._wait(
            self.group.submit(shard, replica, verb) for shard in range(self.shards) for replica in range(self.replicas)
        )

    def _wait(self, refs: Iterable[Ref[Any]]) -> None:
        """Wait for calls, all of which are submitted first."""
        for ref in list(refs):
            self.group.get(ref)
