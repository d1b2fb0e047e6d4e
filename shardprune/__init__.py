"""Prune large language models on all the GPUs there are."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; `__getattr__` finds the same names in the table of commands
    from shardprune.commands.evaluate import evaluate as evaluate
    from shardprune.commands.experts import experts as experts
    from shardprune.commands.export import export as export
    from shardprune.commands.mop import mop as mop
    from shardprune.commands.pipeline import pipeline as pipeline
    from shardprune.commands.prune import prune as prune
    from shardprune.commands.prune import rebuild as rebuild
    from shardprune.commands.recover import recover as recover
    from shardprune.model.exported_model import load_exported as load_exported
    from shardprune.model.semi_structured import to_semi_structured as to_semi_structured
    from shardprune.recipes.evaluate import EvaluateRecipe as EvaluateRecipe
    from shardprune.recipes.experts import ExpertsRecipe as ExpertsRecipe
    from shardprune.recipes.export import ExportRecipe as ExportRecipe
    from shardprune.recipes.mop import MopRecipe as MopRecipe
    from shardprune.recipes.pipeline import PipelineRecipe as PipelineRecipe
    from shardprune.recipes.prune import PruneRecipe as PruneRecipe
    from shardprune.recipes.prune import PruneRecipe as Recipe  # noqa: F401
    from shardprune.recipes.prune import RebuildRecipe as RebuildRecipe
    from shardprune.recipes.recover import RecoverRecipe as RecoverRecipe

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: a solver alone needs neither transformers nor Ray.
    if name.startswith("__"):
        raise AttributeError(f"module 'shardprune' has no attribute {name!r}")
    from shardprune.recipes.commands import public_places

    places = public_places()
    if name == "Recipe":  # the short name of the most used one
        name = "PruneRecipe"
    if name not in places:
        raise AttributeError(f"module 'shardprune' has no attribute {name!r}")
    return getattr(import_module(places[name]), name)
