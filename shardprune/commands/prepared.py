"""A run that can start: what it works on and where, and what its workers must know."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardprune.cluster.layout import Layout
from shardprune.cluster.object_store import store_bytes
from shardprune.cluster.passes import Waves
from shardprune.cluster.placement import Placement
from shardprune.commands.calibration import CalibrationText
from shardprune.commands.memory_needs import least_needs, usual_needs
from shardprune.errors import without_credentials
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.expert_removal import FewerExperts
from shardprune.model.expert_statistics import StatisticsFile
from shardprune.model.pruning_job import Curves, PruningJob, Shapes, Shares, Zeroing
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import Widths, changes, reshaped
from shardprune.recipes.layer_recipe import LayerRecipe
from shardprune.report.result import CalibrationResult
from shardprune.shard.spec import WorkerSpec
from shardprune.solvers.error_curves import windows_of
from shardprune.solvers.outliers import Outliers
from shardprune.solvers.triangles import lower_entries
from shardprune.storage.journal import Earlier, Journal
from shardprune.storage.mixture import held_out_last
from shardprune.storage.windows import tokens_hash


@dataclass(frozen=True)
class Base:
    """The model from which a first run has removed structures, where a second one zeroes weights of what remains.

    `shapes` are those of its projections, none of them ignored; `fingerprint` is the first run's.
    """

    model: str
    shapes: Shapes
    parameters: int
    fingerprint: str


@dataclass(frozen=True)
class Prepared:
    """A run that can start.

    `text` has the calibration windows, which the model may have to write first; `evaluations` has windows
    [windows, seqlen] by source. `earlier` is the run's state in the output, `widths` are those that all layers get,
    `base` is where the model comes from, `fewer` is the model where experts go, by the `statistics` if these are given.
    """

    recipe: LayerRecipe
    job: PruningJob
    placement: Placement
    layout: Layout  # for the workers that there are now
    checkpoint: Checkpoint
    sparse: Checkpoint | None
    skeleton: Skeleton
    text: CalibrationText
    evaluations: dict[str, Tensor]
    journal: Journal
    earlier: Earlier
    widths: Widths | None
    base: Base | None
    fewer: FewerExperts | None = None
    statistics: StatisticsFile | None = None

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """The checkpoints that are read, by the recipe's fields that name them."""
        return {"model": self.checkpoint} | ({"sparse": self.sparse} if self.sparse else {})

    @property
    def streamed(self) -> bool:
        return self.placement.workers.streamed

    @property
    def wave(self) -> int:
        """Sequences of a wave."""
        return self.placement.wave

    @property
    def held_out(self) -> int:
        """The number of calibration windows that are held out."""
        return self.job.improving.held_out(self.recipe.samples)

    def calibration_waves(self, replicas: int) -> Waves:
        """Return the calibration windows as waves over so many replicas."""
        held_out = self.held_out
        windows = self.calibration[held_out_last(self.text.counts, held_out)] if held_out else self.calibration
        return Waves(windows, replicas, self.wave, held_out)

    def curve_waves(self, replicas: int) -> Waves:
        """Return the windows on which error curves are measured as waves; none of them is held out."""
        return Waves(self.calibration_waves(replicas).tokens[: self.curve_windows], replicas, self.wave)

    @property
    def curve_windows(self) -> int:
        """The number of windows on which error curves are measured."""
        return windows_of(self.recipe.samples - self.held_out, self.recipe.seqlen)

    @property
    def shapes(self) -> Shapes:
        """[rows, cols] of every projection, by layer and name."""
        return [self.skeleton.projection_shapes(index) for index in range(self.skeleton.layers)]

    @property
    def calibration(self) -> Tensor:
        """The calibration windows, int64 [samples, seqlen]."""
        return self.text.windows

    @property
    def weights(self) -> int:
        """The number of weights of all projections."""
        return sum(rows * cols for layer in self.shapes for rows, cols in layer.values())

    @property
    def removed(self) -> float:
        """The fraction of the base's weights that its model no longer has, of the projections that are pruned."""
        return 1 - self.weights / self.weights_before

    @property
    def weights_before(self) -> int:
        """The number of weights that these projections have in the model before all runs."""
        if self.base is None:
            return self.weights
        sizes = [{name: rows * cols for name, (rows, cols) in layer.items()} for layer in self.base.shapes]
        return sum(size[name] for size, own in zip(sizes, self.shapes, strict=True) for name in own)

    @property
    def config_changes(self) -> dict[str, Any]:
        """Fields of the model's config that its output has otherwise."""
        return changes(self.skeleton.config, self.widths, range(self.skeleton.layers)) if self.widths else {}

    @property
    def parameters_before(self) -> int:
        """The number of parameters of the model before all runs."""
        return self.base.parameters if self.base else self.skeleton.parameters()

    @property
    def parameters_after(self) -> int:
        """The number of parameters of the model that the run writes."""
        if self.widths is None:
            return self.skeleton.parameters()
        return Skeleton(reshaped(self.skeleton.config, self.widths), "cpu").parameters()

    def as_base(self) -> Base:
        """Return this run as the first of two."""
        return Base(self.placement.workers.model, self.shapes, self.skeleton.parameters(), self.journal.fingerprint)

    def facts(self) -> dict[str, Any]:
        """Return the facts of the event `run`."""
        fingerprint, layers = self.journal.fingerprint, self.skeleton.layers
        return {"command": self.recipe.command, "fingerprint": fingerprint, "layers": layers}

    def record(self) -> dict[str, Any]:
        """Return the recipe, with every choice made, for files that others read."""
        choices = self.placement.choices() | ({"sparse": self.job.sparse} if self.job.sparse else {})
        choices |= self.recipe.decided
        asked = self.recipe.record().keys()
        decided = self.recipe.model_copy(update={name: choices[name] for name in choices if name in asked})
        return decided.record() | ({"model": without_credentials(self.base.model)} if self.base else {})

    def calibration_result(self) -> CalibrationResult:
        """Return what a result says of the calibration text."""
        return CalibrationResult(
            source=without_credentials(" + ".join(self.recipe.calibration)),
            samples=self.recipe.samples,
            held_out=self.held_out or None,
            seqlen=self.recipe.seqlen,
            tokens_sha256=tokens_hash(self.calibration),
        )

    def shares(self, outliers: list[Outliers], curves: Curves) -> Shares:
        """Return what every projection gives up; empty where a sparse checkpoint says it.

        Args:
            outliers: by layer, where the allocation looks at them.
            curves: of all projections, where the allocation measures them.
        """
        zeroing = self.job.zeroing
        return zeroing.shares(self.shapes, outliers, self.removed, curves) if isinstance(zeroing, Zeroing) else {}

    # -- workers ------------------------------------------------------------------------------------------------

    def worker_specs(self, layout: Layout, finished: set[int], kept_bytes: int) -> list[WorkerSpec]:
        """Return what each worker of a layout must know.

        Args:
            kept_bytes: what a worker keeps of the calibration waves.
        """
        placement = self.placement
        least, usual, others = least_needs(self, layout), usual_needs(self, layout), self._other_bytes
        states = {field: checkpoint.state() for field, checkpoint in self.inputs.items()}
        return [
            WorkerSpec(
                settings=placement.workers,
                out=placement.out,
                fingerprint=self.journal.fingerprint,
                shard=shard,
                replica=replica,
                layers=layers,
                job=self.job,
                widths=self.widths,
                activation_bytes=kept_bytes,
                finished=frozenset(finished),
                need=least[shard] if least else None,
                other_bytes=usual[shard].bytes + others,
                model=states["model"],
                samples=self.recipe.samples,
                held_out=self.held_out,
                ignore=getattr(self.recipe, "ignore", ()),
                sparse=states.get("sparse"),
            )
            for shard, layers in enumerate(layout.shards)
            for replica in range(layout.replicas)
        ]

    def kept_bytes(self, replicas: int, streams: int) -> int:
        """Return the bytes of the calibration waves that a worker keeps: one share of `replicas` of the samples, once
        for each of the `streams` that it holds, and once more for the dense activations beside one of them."""
        streams += bool(self.job.improving)
        samples, seqlen = self.recipe.samples, self.recipe.seqlen
        hidden = self.skeleton.wave_columns(seqlen) * self.placement.dtype.itemsize
        held_out = self.held_out
        sequences = -(-(samples - held_out) // replicas) + -(-held_out // replicas)
        return streams * sequences * seqlen * hidden

    def curve_bytes(self, layout: Layout) -> int:
        """Return the bytes that a worker keeps for error curves: what enters each of its layers, and gradients in
        float32."""
        if not self.job.measures:
            return 0
        sequences = -(-self.curve_windows // layout.replicas)
        wide = len(max(layout.shards, key=len)) * self.placement.dtype.itemsize + 4
        seqlen = self.recipe.seqlen
        return sequences * seqlen * self.skeleton.wave_columns(seqlen) * wide

    def store_bytes(self, sent: int) -> int:
        """Return the memory for what is under way between workers: waves, the sums that replicas exchange, and `sent`
        bytes of weights and gradients."""
        itemsize = self.placement.dtype.itemsize
        width = 4 if self.job.measures else itemsize  # of gradients
        wave = self.wave * self.recipe.seqlen * self.skeleton.wave_columns(self.recipe.seqlen) * width
        if self.placement.workers.exchange == "group":  # waves and sums do not go through the store
            return store_bytes(self.layout, 0, sent=sent)
        columns = [
            [shapes[name][1] for name in kind.input_names]
            for kind, shapes in zip(self.skeleton.family.kinds, self.shapes, strict=True)
        ]
        most = max(columns, key=lambda of_layer: sum(map(lower_entries, of_layer)))
        kinds = 2 if self.job.improving.measured else 1  # with sums over held-out windows
        return store_bytes(self.layout, wave, kinds * most, sent)

    @property
    def layer_bytes(self) -> int:
        """The bytes of the projections of the largest layer as they are computed with."""
        return (
            max(sum(rows * cols for rows, cols in layer.values()) for layer in self.shapes)
            * self.placement.dtype.itemsize
        )

    @property
    def _other_bytes(self) -> int:
        """Return the bytes of what other jobs than zeroing hold beside what zeroing holds: a narrowed layer beside the
        one that it comes from, or the dense weights of a block whose masks are rebuilt, their gradients, and the
        float32 sums of those squared."""
        itemsize = self.placement.dtype.itemsize
        if self.job.scoring:
            return self.layer_bytes
        return (4 + 2 * itemsize) * self.layer_bytes // itemsize if self.job.rebuilding else 0
