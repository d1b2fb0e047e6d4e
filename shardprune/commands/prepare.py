"""Preparation of a run: inputs opened and checked, layout and fingerprint decided, the output looked at. Nothing is
written here."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shardprune.cluster.defaults import device_of
from shardprune.cluster.group import Backend, check_room
from shardprune.cluster.layout import Layout, plan_layout
from shardprune.cluster.object_store import store_bytes
from shardprune.cluster.passes import Waves
from shardprune.cluster.placement import Placement, place_run
from shardprune.commands.calibration import CalibrationText, text_of
from shardprune.commands.fingerprint import fingerprint_of
from shardprune.commands.memory_needs import least_needs, usual_needs
from shardprune.errors import InputError, without_credentials
from shardprune.extras import check_extra
from shardprune.model.allocation_file import FIELD as ALLOCATED
from shardprune.model.allocation_file import read_allocation
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.checks import check_seqlen, check_sparse
from shardprune.model.expert_removal import FewerExperts, fewer_experts_of
from shardprune.model.expert_statistics import StatisticsFile, read_statistics
from shardprune.model.families import FAMILIES, structures_of
from shardprune.model.further_layers import FurtherLayers
from shardprune.model.opening import open_checkpoint, open_model, open_texts
from shardprune.model.pruning_job import Adopted, Curves, PruningJob, Shapes, Shares, WidthRemoval, Zeroing
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.removal import widths_left
from shardprune.model.structure.shape import Widths, changes, reshaped
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.layer_recipe import LayerRecipe
from shardprune.report.result import CalibrationResult
from shardprune.shard.spec import WorkerSpec
from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.solvers.allocation.mixed import nonzeros_in_all
from shardprune.solvers.error_curves import windows_of
from shardprune.solvers.expert_scores import needs_pass
from shardprune.solvers.improving import held_out_last
from shardprune.solvers.outliers import Outliers
from shardprune.solvers.pattern import Mixed
from shardprune.solvers.triangles import lower_entries
from shardprune.storage.folder import Folder
from shardprune.storage.journal import Earlier, Journal, check_output
from shardprune.storage.locations import absolute, check_reachable
from shardprune.storage.retrying import preflight
from shardprune.storage.windows import tokens_hash


@dataclass(frozen=True)
class Base:
    """The model from which a first run has removed structures, where a second one zeroes weights of what remains.

    `weights` are those of its projections; `fingerprint` is the first run's.
    """

    model: str
    weights: int
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
        samples, held_out = self.recipe.samples, self.held_out
        windows = self.calibration[held_out_last(samples, held_out)] if held_out else self.calibration
        return Waves(windows, replicas, self.wave, held_out)

    def curve_waves(self, replicas: int) -> Waves:
        """Return the windows on which error curves are measured as waves; none of them is held out."""
        windows = self.calibration_waves(replicas).tokens
        count = windows_of(self.recipe.samples - self.held_out, self.recipe.seqlen)
        return Waves(windows[:count], replicas, self.wave)

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
        """The fraction of the base's weights that its model no longer has."""
        return 1 - self.weights / self.base.weights if self.base else 0.0

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
        return Base(self.placement.workers.model, self.weights, self.skeleton.parameters(), self.journal.fingerprint)

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
                samples=self.recipe.samples - self.held_out,
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
        sequences = -(-len(self.curve_waves(1).tokens) // layout.replicas)
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


@preflight()
def prepare(
    recipe: LayerRecipe, backend: Backend, first: Prepared | None = None, claimed: str | None = None
) -> Prepared:
    """Open and check everything that a recipe names, and decide what it leaves open.

    Args:
        first: the run that makes the recipe's model, where this is the second of two; its calibration text stays.
        claimed: the output of the second run, where this is the first: it may hold what was decided earlier.

    Raises:
        InputError: something cannot work; nothing has been written then.
    """
    job = recipe.job()
    if isinstance(recipe, ExpertsRecipe) and recipe.merge:
        check_extra("experts", "merge")
    for field, url in (
        ("model", recipe.model),
        ("sparse", job.sparse),
        (ALLOCATED, getattr(recipe, ALLOCATED, None)),
        ("statistics", getattr(recipe, "statistics", None)),
        ("out", recipe.out),
    ):
        if url:
            check_reachable(field, url, recipe.backend)
    for out in (claimed, recipe.out):  # before models and texts are read, which may be downloads
        if out:
            check_output(absolute(out), recipe.resume)
    slots = backend.slots()
    device = device_of(recipe.device, slots)
    # Where structures go, all that is cut passes through memory: biases and norms, too.
    float32 = recipe.dtype == "float32" or device == "cpu"
    ignore = getattr(recipe, "ignore", ())
    fp8_as = torch.float32 if recipe.dtype == "float32" else None
    opened = open_model(recipe.model, float32=float32, whole=job.scoring is not None, ignore=ignore, fp8_as=fp8_as)
    checkpoint, skeleton = opened.checkpoint, opened.skeleton
    if getattr(recipe, "reads_text", True) or recipe.eval:
        check_seqlen(recipe.seqlen, skeleton)
    asked = recipe.asked
    # Before anything is read that takes time: shards and replicas that the machine is to choose are one here.
    plan_layout(
        skeleton.layers, recipe.samples, asked.propagation, asked.shards or 1, asked.replicas or 1, asked.segments
    )
    _check_mixed(job, skeleton)
    fewer = fewer_experts_of(job, checkpoint, skeleton)
    if fewer:
        FurtherLayers(fewer)  # which it checks
        _check_copied(recipe, checkpoint)
    statistics = _given_statistics(recipe, checkpoint, fewer)
    mixture = any(kind.mixtures for kind in skeleton.family.kinds)
    if asked.chunks > 1 and not mixture:
        raise InputError("expert_chunks", f"{asked.chunks} has no effect: the model has no experts; leave it out")
    if isinstance(job.zeroing, Zeroing) and job.zeroing.all_tokens and not mixture:
        raise InputError("expert_tokens", "'all' has no effect: the model has no experts; leave it out")
    if job.improving.stream_targets:
        if getattr(recipe, "targets", None) == "auto" and skeleton.config.model_type not in FAMILIES:
            recipe = recipe.model_copy(update={"targets": "own"})  # as its outputs in the stream are not known
            job = recipe.job()
        else:
            structures_of(skeleton.config.model_type, "targets")
    widths = widths_left(job.removal, skeleton) if isinstance(job.removal, WidthRemoval) else None
    job, given = _with_given(recipe, job, skeleton)
    sparse = None
    if isinstance(job.zeroing, Adopted):
        adopted = replace(job.zeroing, sparse=place_of(job.zeroing.sparse))
        job = replace(job, zeroing=adopted)
        sparse = open_checkpoint(adopted.sparse, "sparse")
        check_sparse(skeleton, sparse, checkpoint, adopted.pattern)

    text = first.text if first else text_of(recipe, opened)
    evaluations = open_texts(recipe.eval, opened, recipe.seqlen, recipe.eval_windows)

    placement = place_run(recipe, slots, device, skeleton, claimed)
    base = first.as_base() if first else None
    identity = base.fingerprint if base else checkpoint.identity()
    fingerprint = fingerprint_of(
        recipe, placement, identity, sparse, text, given, statistics.digest() if statistics else None
    )
    place = fewer.place if fewer else checkpoint.place
    journal = Journal(placement.out, fingerprint, skeleton.layers, place)
    earlier = journal.check(recipe.resume)
    # What was started goes on with the workers that there are.
    check_room(backend, 1 if earlier else asked.workers, device)
    layout = placement.layout.shrunk_to(int(min(backend.room(device), placement.layout.workers)))
    if first is None:
        text.written_by(checkpoint, skeleton, placement.workers, layout, absolute(claimed or recipe.out))
    return Prepared(
        recipe=recipe,
        job=job,
        placement=placement,
        layout=layout,
        checkpoint=checkpoint,
        sparse=sparse,
        skeleton=skeleton,
        text=text,
        evaluations=evaluations,
        journal=journal,
        earlier=earlier,
        widths=widths,
        base=base,
        fewer=fewer,
        statistics=statistics,
    )


def _given_statistics(recipe: LayerRecipe, checkpoint: Checkpoint, fewer: FewerExperts | None) -> StatisticsFile | None:
    """Return the statistics of experts that a recipe names, where it does.

    Raises:
        InputError: there are none of this model there, or not those that the score looks at.
    """
    if not isinstance(recipe, ExpertsRecipe) or recipe.statistics is None:
        return None
    assert fewer is not None
    folder = Folder(absolute(recipe.statistics), "statistics")
    found = read_statistics(folder, checkpoint.identity(), fewer.mixture)
    if needs_pass(recipe.score) and not found.has_scores(recipe.score, fewer.mixture.layers):
        raise InputError("statistics", f"{folder.url} has made no whole pass, and score {recipe.score} needs one")
    if recipe.merge and not found.has_distances(fewer.mixture.layers):
        raise InputError("statistics", f"{folder.url} has no distances between outputs; give that of a run with merge")
    if found.propagated != "dense":
        raise InputError("statistics", f"{folder.url} has those of layers behind cut ones, which fit no other cut")
    return found


def _with_given(recipe: LayerRecipe, job: PruningJob, skeleton: Skeleton) -> tuple[PruningJob, Sparsities | None]:
    """Return the job with the sparsities of the recipe's allocation file, and these, where there is one.

    Raises:
        InputError: it is not one for this model and this target.
    """
    file = getattr(recipe, ALLOCATED, None)
    if file is None:
        return job, None
    assert isinstance(job.zeroing, Zeroing)
    shapes = [skeleton.projection_shapes(layer) for layer in range(skeleton.layers)]
    given = read_allocation(file, shapes, job.zeroing.target)
    return replace(job, zeroing=replace(job.zeroing, given=given)), given


def _check_copied(recipe: LayerRecipe, checkpoint: Checkpoint) -> None:
    """Check that an FP8 model's experts stay what they are, where its layers are copied as they are stored.

    Raises:
        InputError: they would have to be quantised again.
    """
    for field in ("reconstruct", "merge"):
        if checkpoint.fp8 and (value := getattr(recipe, field, None)):
            reason = "changes the weights of experts, and these are FP8, which are only copied"
            raise InputError(field, f"{value!r} {reason}; leave it out, or give the model from which they were made")


def _check_mixed(job: PruningJob, skeleton: Skeleton) -> None:
    """Check that N of M can have the target as their mean over the layers, in whole groups.

    Raises:
        InputError: M does not divide the inputs of a projection, or no N has the target as its mean.
    """
    zeroing = job.zeroing
    if not isinstance(zeroing, Zeroing) or not isinstance(zeroing.pattern, Mixed):
        return
    inputs = {
        name: cols for index in range(skeleton.layers) for name, (_, cols) in skeleton.projection_shapes(index).items()
    }
    for name, cols in inputs.items():
        if cols % zeroing.pattern.m:
            raise InputError("pattern", f"{zeroing.pattern} does not fit {name}, which has {cols} inputs")
    try:
        layers = sum(1 for kind in skeleton.family.kinds if kind.inputs)
        nonzeros_in_all(zeroing.target, layers, zeroing.pattern.m)
    except ValueError as error:
        reason = f"{zeroing.target} does not fit the pattern {zeroing.pattern}: {error}"
        raise InputError("sparsity", reason) from error
