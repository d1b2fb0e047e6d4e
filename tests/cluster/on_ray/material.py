"""Runs over the bundled model, which last long enough for something to happen to them."""

from shardprune import MopRecipe, Recipe
from shardprune.recipes.demo import bundled_model


def bundled(out, **fields) -> Recipe:
    """A run over the bundled model."""
    values = {
        "model": bundled_model(),
        "out": str(out),
        "sparsity": 0.5,
        "calibration": "stdlib",
        "samples": 16,
        "seqlen": 128,
        "threads": 1,
        **fields,
    }
    return Recipe.checked(values)


def search(out, **fields) -> MopRecipe:
    """A search over the bundled model, of some ten iterations."""
    values = bundled(out, samples=8, seqlen=64).model_dump(
        include=set(MopRecipe.model_fields) - {"score", "correction", "outlier_m"}
    )
    return MopRecipe.checked({**values, "remove": 0.3, "criterion": "kl", **fields})
