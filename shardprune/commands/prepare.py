"""Preparation of a run: inputs opened and checked, layout and fingerprint decided, the output looked at. Nothing is
written here."""

from dataclasses import replace
from typing import TypeVar

import torch

from shardprune.cluster.defaults import device_of
from shardprune.cluster.group import Backend, check_room
from shardprune.cluster.layout import plan_layout
from shardprune.cluster.placement import place_run
from shardprune.commands.calibration import text_of
from shardprune.commands.fingerprint import fingerprint_of
from shardprune.commands.prepared import Prepared
from shardprune.errors import InputError
from shardprune.extras import check_extra
from shardprune.model.allocation_file import FIELD as ALLOCATED
from shardprune.model.allocation_file import read_allocation
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.checks import check_seqlen, check_sparse
from shardprune.model.expert_removal import FewerExperts, fewer_experts_of
from shardprune.model.expert_statistics import StatisticsFile, read_statistics
from shardprune.model.further_layers import FurtherLayers
from shardprune.model.opening import open_checkpoint, open_model, open_texts
from shardprune.model.pruning_job import Adopted, PruningJob, WidthRemoval, Zeroing
from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.removal import widths_left
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.fitting import fitted
from shardprune.recipes.layer_recipe import LayerRecipe
from shardprune.solvers.allocation.allocation import Sparsities
from shardprune.solvers.expert_scores import needs_pass
from shardprune.storage.folder import Folder
from shardprune.storage.journal import Journal, check_output
from shardprune.storage.locations import absolute, check_reachable
from shardprune.storage.retrying import preflight


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
    recipe = settled(recipe, skeleton)  # before anything is read that takes time
    job, asked = recipe.job(), recipe.asked
    fewer = fewer_experts_of(job, checkpoint, skeleton)
    if fewer:
        FurtherLayers(fewer)  # which it checks
        _check_copied(recipe, checkpoint)
    statistics = _given_statistics(recipe, checkpoint, fewer)
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


R = TypeVar("R", bound=LayerRecipe)


def settled(recipe: R, skeleton: Skeleton) -> R:
    """Return a recipe with what its model decides. Its layout is possible, as far as it is asked for: shards and
    replicas that the machine is to choose are one here.

    Raises:
        InputError: a field does not go with the model.
    """
    recipe = fitted(recipe, skeleton)
    asked, held_out = recipe.asked, recipe.job().improving.held_out(recipe.samples)
    shards, replicas = asked.shards or 1, asked.replicas or 1
    plan_layout(skeleton.layers, recipe.samples, asked.propagation, shards, replicas, asked.segments, held_out)
    return recipe


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
