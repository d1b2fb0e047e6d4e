"""What a recipe's model decides of it: fields that do not go with the model, and those that are left to it. A run and
the plan of one ask here."""

from typing import TypeVar

from shardprune.errors import InputError
from shardprune.model.experts import IDLE
from shardprune.model.families import FAMILIES, structures_of
from shardprune.model.skeleton import Skeleton
from shardprune.recipes.prune import ZeroingFields
from shardprune.recipes.settings import Settings
from shardprune.solvers.allocation.mixed import nonzeros_in_all
from shardprune.solvers.pattern import Mixed

R = TypeVar("R", bound=Settings)


def fitted(recipe: R, skeleton: Skeleton) -> R:
    """Return a recipe with what depends on its model decided.

    Raises:
        InputError: a field does not go with the model.
    """
    mixture = any(kind.mixtures for kind in skeleton.family.kinds)
    chunks = getattr(recipe, "expert_chunks", None) or 1
    if chunks > 1 and not mixture:
        raise InputError("expert_chunks", f"{chunks} has no effect: the model has no experts; leave it out")
    if not isinstance(recipe, ZeroingFields):
        return recipe
    if recipe.zeroes and isinstance(recipe.zeros, Mixed):
        _check_mixed(recipe.target, recipe.zeros, skeleton)
    if recipe.expert_tokens == "all":
        if not mixture:
            raise InputError("expert_tokens", "'all' has no effect: the model has no experts; leave it out")
        if getattr(skeleton.config, IDLE, None):
            reason = f"transformers' code of {skeleton.config.model_type} sends no token to one expert alone"
            raise InputError("expert_tokens", f"'all' is not possible: {reason}; use routed")
    if recipe.towards_stream:
        if recipe.targets == "auto" and skeleton.config.model_type not in FAMILIES:
            return recipe.model_copy(update={"targets": "own"})  # as its outputs in the stream are not known
        structures_of(skeleton.config.model_type, "targets")
    return recipe


def _check_mixed(target: float, pattern: Mixed, skeleton: Skeleton) -> None:
    """Check that N of M can have the target as their mean over the layers, in whole groups.

    Raises:
        InputError: M does not divide the inputs of a projection, or no N of layers of one size has the target as mean.
    """
    shapes = [skeleton.projection_shapes(index) for index in range(skeleton.layers)]
    for name, (_, cols) in (each for layer in shapes for each in layer.items()):
        if cols % pattern.m:
            raise InputError("pattern", f"{pattern} does not fit {name}, which has {cols} inputs")
    sizes = [sum(rows * cols for rows, cols in layer.values()) for layer in shapes if layer]
    if len(set(sizes)) > 1:  # of which hardly any mean can be met: the nearest is
        return
    try:
        nonzeros_in_all(target, len(sizes), pattern.m)
    except ValueError as error:
        raise InputError("sparsity", f"{target} does not fit the pattern {pattern}: {error}") from error
