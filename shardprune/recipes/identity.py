"""TODO."""

from shardprune.recipes.groups import CalibrationFields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe, WidthRecipe

AnyRecipe = PruneRecipe | WidthRecipe | RebuildRecipe | MopRecipe


def shaping_fields(recipe: AnyRecipe | type[AnyRecipe]) -> set[str]:
    """The fields of a recipe that shape what the layer files hold, beside model and text."""
    return {name for group in recipe.shaping for name in group.model_fields} | {"measure_error"}


def identifying_fields(recipe: type[AnyRecipe]) -> set[str]:
    """The fields of a recipe that say which run it is, as far as they do not depend on machines."""
    named = {*shaping_fields(recipe), *CalibrationFields.model_fields, "model", "sparse", "propagation"}
    return named & set(recipe.model_fields)
