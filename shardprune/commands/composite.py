"""The second run of a composite, which zeroes weights in the model that the first run has removed structures from."""

from shardprune.commands.fingerprint import fingerprint_of
from shardprune.commands.prepared import Prepared
from shardprune.commands.state import RunState
from shardprune.recipes.prune import PruneRecipe
from shardprune.storage.journal import Journal
from shardprune.storage.locations import absolute


def claim_output(recipe: PruneRecipe, first: Prepared) -> RunState:
    """Claim the output of the second run before the first one starts, if it is free, and return the run's state.

    Raises:
        InputError: the directory holds something else, or may not be resumed.
    """
    second, identity = second_recipe(recipe, first, first.placement.out), first.journal.fingerprint
    fingerprint = fingerprint_of(second, first.placement, identity, None, first.text)
    journal = Journal(second.out, fingerprint, first.skeleton.layers)
    earlier = journal.check(recipe.resume)
    if not earlier:
        journal.save({})
    return RunState(journal, earlier, second.record(), first.evaluations, {})


def second_recipe(recipe: PruneRecipe, first: Prepared, model: str) -> PruneRecipe:
    """Return the recipe of the second run, with what was decided for the first one.

    Args:
        model: what the first one has made.
    """
    # What it claims before the first run starts is its own: it always resumes that.
    place = {"model": model, "out": absolute(recipe.out), "resume": True}
    return recipe.model_copy(update={**first.placement.choices(), **place})
