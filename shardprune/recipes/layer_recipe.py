"""The recipes whose runs change a model's layers. Each has a `job()`, and a `shape()` that tells its runs apart."""

from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe, WidthRecipe

LayerRecipe = PruneRecipe | WidthRecipe | RebuildRecipe | MopRecipe | ExpertsRecipe
