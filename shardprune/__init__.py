"""Prune large language models on all the GPUs there are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardprune.recipe import RebuildRecipe, Recipe
    from shardprune.run import prune, rebuild

__all__ = ["RebuildRecipe", "Recipe", "prune", "rebuild"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: whoever wants a solver alone needs neither transformers nor Ray.
    if name in ("Recipe", "RebuildRecipe"):
        from shardprune import recipe

        return getattr(recipe, name)
    if name in ("prune", "rebuild"):
        from shardprune import run

        return getattr(run, name)
    raise AttributeError(f"module 'shardprune' has no attribute {name!r}")
