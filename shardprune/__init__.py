"""Prune large language models on all the GPUs there are."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardprune.commands.evaluate import evaluate
    from shardprune.commands.mop import mop
    from shardprune.commands.pipeline import pipeline
    from shardprune.commands.prune import prune, rebuild
    from shardprune.commands.recover import recover
    from shardprune.recipes.evaluate import EvaluateRecipe
    from shardprune.recipes.mop import MopRecipe
    from shardprune.recipes.pipeline import PipelineRecipe
    from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
    from shardprune.recipes.prune import PruneRecipe as Recipe
    from shardprune.recipes.recover import RecoverRecipe

__all__ = [
    "EvaluateRecipe",
    "MopRecipe",
    "PipelineRecipe",
    "PruneRecipe",
    "RebuildRecipe",
    "Recipe",
    "RecoverRecipe",
    "evaluate",
    "mop",
    "pipeline",
    "prune",
    "rebuild",
    "recover",
]
__version__ = "0.1.0"


_PLACES = {
    "EvaluateRecipe": "recipes.evaluate",
    "MopRecipe": "recipes.mop",
    "PipelineRecipe": "recipes.pipeline",
    "RebuildRecipe": "recipes.prune",
    "PruneRecipe": "recipes.prune",
    "Recipe": "recipes.prune",  # the short name of the most used one
    "RecoverRecipe": "recipes.recover",
    "evaluate": "commands.evaluate",
    "mop": "commands.mop",
    "pipeline": "commands.pipeline",
    "prune": "commands.prune",
    "rebuild": "commands.prune",
    "recover": "commands.recover",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: whoever wants a solver alone needs neither transformers nor Ray.
    if name not in _PLACES:
        raise AttributeError(f"module 'shardprune' has no attribute {name!r}")
    return getattr(import_module(f"shardprune.{_PLACES[name]}"), "PruneRecipe" if name == "Recipe" else name)
