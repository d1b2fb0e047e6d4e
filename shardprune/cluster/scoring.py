"""Scores of a model that lies on many workers: waves through all or some of its layers, and measures of the outputs."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardprune.cluster.group import Ref, ReplicaSubset, flow
from shardprune.cluster.layout import Layout
from shardprune.cluster.passes import Waves, in_flight, in_wave_order
from shardprune.errors import SolverError
from shardprune.model.structure.path import Letter
from shardprune.report.progress import Step
from shardprune.shard.forward_worker import ForwardWorker
from shardprune.shard.layers import Version
from shardprune.shard.likelihoods import perplexity_of
from shardprune.shard.mop_worker import REFERENCE, MopWorker, Watched
from shardprune.shard.waves import Wave
from shardprune.solvers.scoring import Criterion


@dataclass(frozen=True)
class CandidateScorer:
    """The workers that carry waves through a model, and the waves."""

    team: ReplicaSubset
    layout: Layout
    waves: Waves

    @property
    def last(self) -> int:
        """The last shard: it has the head, and the outputs of the original model."""
        return len(self.layout.shards) - 1

    def through(
        self, without: int | None = None, version: Version = "dense", watched: Watched = "nothing"
    ) -> Iterator[Ref[Tensor]]:
        """Send every wave through all layers but one, one wave behind the other; yield the outputs."""
        for wave in self.waves.in_turn():
            hidden = self.team.submit(0, wave.replica, ForwardWorker.embed, self.waves.windows(wave))
            for shard, layers in enumerate(self.layout.shards):
                if kept := tuple(layer for layer in layers if layer != without):
                    hidden = self.team.submit(
                        shard, wave.replica, MopWorker.run, wave.index, hidden, kept, version, watched
                    )
            yield hidden

    def refer(self, step: Step) -> None:
        """Keep the outputs of the original model's last layer, to compare candidates with."""
        self._at_the_end(ForwardWorker.put, step, lambda wave, hidden: (REFERENCE, wave.index, hidden))

    def angles(self, step: Step) -> dict[int, float]:
        """Return the mean cosine similarity over tokens between the input and the output of each current layer."""
        self._at_the_end(ForwardWorker.discard, step, lambda _wave, hidden: (hidden,), "angles")
        tokens = self.waves.tokens.numel()
        means = {}
        for shard, layers in enumerate(self.layout.shards):
            for layer in layers:
                refs = [
                    self.team.submit(shard, replica, MopWorker.angles, layer) for replica in range(self.layout.replicas)
                ]
                sums = {wave: total for ref in refs for wave, total in self.team.get(ref).items()}
                means[layer] = sum(in_wave_order(sums)) / tokens
        return means

    def gather(self, step: Step) -> None:
        """Sum up the inputs of all layers of the current model in one pass."""
        self._at_the_end(ForwardWorker.discard, step, lambda _wave, hidden: (hidden,), "inputs")

    def scores(self, criterion: Criterion, without: Sequence[int | None], version: Version, step: Step) -> list[float]:
        """Return the scores of the model without each of some layers (None: with all), by one criterion.

        The waves of one candidate follow those of the one before it, so that different ones are at different shards
        at the same time. Lower is better for perplexity and `kl` (mean divergence from the original model over all
        tokens), higher for `cosine` (mean over tokens, of the logits).
        """
        order = self.waves.in_turn()

        def judged() -> Iterator[Ref[list[float]]]:
            for layer in without:
                for wave, hidden in zip(order, self.through(layer, version), strict=True):
                    if criterion == "perplexity":
                        windows = self.waves.windows(wave)
                        yield self.team.submit(self.last, wave.replica, ForwardWorker.losses, hidden, windows)
                    else:
                        yield self.team.submit(self.last, wave.replica, MopWorker.judge, wave.index, hidden, criterion)

        values = flow(self.team, judged(), in_flight(self.layout))
        scores = []
        samples, seqlen = self.waves.tokens.shape
        for _ in without:
            sums: dict[int, list[float]] = {}
            for wave in order:
                sums[wave.index] = next(values)
                step.advance()
            total = sum(value for values in in_wave_order(sums) for value in values)
            if criterion == "perplexity":
                scores.append(perplexity_of(total / (samples * (seqlen - 1))))
            else:
                scores.append(total / (samples * seqlen))
        return scores

    def _at_the_end(
        self,
        verb: Callable[..., None],
        step: Step,
        arguments: Callable[[Wave, Ref], tuple],
        watched: Watched = "nothing",
    ) -> None:
        """Call a verb of the last shard's workers for every output of the current model."""
        order = self.waves.in_turn()
        refs = (
            self.team.submit(self.last, wave.replica, verb, *arguments(wave, hidden))
            for wave, hidden in zip(order, self.through(watched=watched), strict=True)
        )
        for _ in flow(self.team, refs, in_flight(self.layout)):
            step.advance()


def best_letter(criterion: Criterion, scores: dict[str, float], iteration: int) -> Letter:
    """Return the candidate of an iteration with the better score.

    Raises:
        SolverError: a score is not finite.
    """
    if not all(map(math.isfinite, scores.values())):
        found = ", ".join(f"{letter}: {score:g}" for letter, score in scores.items())
        raise SolverError(f"iteration {iteration}: candidates cannot be compared by {criterion}, which is {found}")
    return "L" if better(criterion, scores["L"], scores["G"]) else "G"


def better(criterion: Criterion, one: float, other: float) -> bool:
    """Return whether one score is better than another."""
    return one > other if criterion == "cosine" else one < other
