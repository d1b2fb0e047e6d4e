"""Prune large language models on all the GPUs there are."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardprune.evaluation.recipe import EvaluateRecipe
    from shardprune.evaluation.run import evaluate
    from shardprune.fine_tuning import recover
    from shardprune.mop_recipe import MopRecipe
    from shardprune.pipeline_recipe import PipelineRecipe
    from shardprune.pipelines import pipeline
    from shardprune.recipe import RebuildRecipe, Recipe
    from shardprune.recover_recipe import RecoverRecipe
    from shardprune.run import prune, rebuild
    from shardprune.search import mop

__all__ = [
    "EvaluateRecipe",
    "MopRecipe",
    "PipelineRecipe",
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
    "EvaluateRecipe": "evaluation.recipe",
    "MopRecipe": "mop_recipe",
    "PipelineRecipe": "pipeline_recipe",
    "RebuildRecipe": "recipe",
    "Recipe": "recipe",
    "RecoverRecipe": "recover_recipe",
    "evaluate": "evaluation.run",
    "mop": "search",
    "pipeline": "pipelines",
    "prune": "run",
    "rebuild": "run",
    "recover": "fine_tuning",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: whoever wants a solver alone needs neither transformers nor Ray.
    if name not in _PLACES:
        raise AttributeError(f"module 'shardprune' has no attribute {name!r}")
    return getattr(import_module(f"shardprune.{_PLACES[name]}"), name)
