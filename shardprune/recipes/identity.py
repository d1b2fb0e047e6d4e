"""Identity of a run that changes a model's layers: the fields of its recipe that shape the tensors."""

from typing import Any

from shardprune.recipes.groups import CalibrationFields
from shardprune.recipes.settings import Settings


def shaping_fields(recipe: Settings | type[Any]) -> set[str]:
    """Return the fields of a `LayerRecipe` that shape what the layer files hold, beside models and text: those of the
    groups that it names in `shaping`."""
    groups: tuple[type[Settings], ...] = getattr(recipe, "shaping")  # noqa: B009
    return {name for group in groups for name in group.model_fields} | {"measure_error"}


def shape_of(recipe: Settings, *late: str) -> dict[str, Any]:
    """Return the fields of a recipe that shape what the layer files hold, with their values.

    Args:
        late: fields that earlier versions did not have. At their default they are left out, so that runs of these go
            on.
    """
    defaults = {name: type(recipe).model_fields[name].get_default() for name in late}
    left_out = {name for name, default in defaults.items() if getattr(recipe, name) == default}
    return recipe.model_dump(include=shaping_fields(recipe) - left_out)


def identifying_fields(recipe: type[Any]) -> set[str]:
    """Return the fields of a `LayerRecipe` class that say which run it is, as far as they do not depend on machines."""
    named = {*shaping_fields(recipe), *CalibrationFields.model_fields, "model", "sparse", "propagation"}
    return named & set(recipe.model_fields)
