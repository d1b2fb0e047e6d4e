"""Prune large language models on all the GPUs there are."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardprune.recipe import Recipe
    from shardprune.run import prune

__all__ = ["Recipe", "prune"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: whoever wants a solver alone needs neither transformers nor Ray.
    if name == "Recipe":
        from shardprune.recipe import Recipe

        return Recipe
    if name == "prune":
        from shardprune.run import prune

        return prune
    raise AttributeError(f"module 'shardprune' has no attribute {name!r}")
