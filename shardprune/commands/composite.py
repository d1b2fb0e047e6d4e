"""The second of two runs: weights become zero of what a first one has left, which removed structures."""

from typing import Any

from shardprune.commands.fingerprint import fingerprint_of
from shardprune.commands.prepare import Plan
from shardprune.recipes.prune import PruneRecipe
from shardprune.storage.folder import absolute
from shardprune.storage.journal import Journal


def claim_output(recipe: PruneRecipe, first: Plan) -> tuple[Journal, dict[str, Any]]:
    """The output directory of the second of two runs before the first one starts, and its state; it is claimed
    where it was free.

    Raises:
        InputError: the directory holds something else, or may not be resumed.
    """
    second, identity = second_recipe(recipe, first, first.recipe.out), first.journal.fingerprint
    fingerprint = fingerprint_of(second, first.layout, first.skeleton.dtype, identity, None, first.calibration)
    journal = Journal(second.out, fingerprint, first.skeleton.layers)
    state = journal.check(recipe.resume)
    if state is None:
        journal.save({})
    return journal, state or {}


def second_recipe(recipe: PruneRecipe, first: Plan, model: str) -> PruneRecipe:
    """The recipe of the second of two runs, with what was decided for the first one.

    Args:
        model: what the first one has made.
    """
    decided = ("shards", "replicas", "segments", "threads", "wave", "device")
    update = {name: getattr(first.recipe, name) for name in decided}
    # What it claims before the first run starts is its own: it always resumes that.
    place = {"model": model, "out": absolute(recipe.out), "resume": True}
    return recipe.model_copy(update={**update, **place})
