"""The demo: the bundled model, the standard library as text, no network."""

from importlib.resources import files

from shardprune.recipes.prune import PruneRecipe


def bundled_model() -> str:
    """The directory of the model inside the package: a small Llama trained on the standard library."""
    return str(files("shardprune") / "assets" / "stdlib-4m")


def demo_recipe(out: str, shards: int) -> PruneRecipe:
    """SparseGPT to 50 % on Ray shards, measured on held-out modules."""
    return PruneRecipe.checked(
        {
            "model": bundled_model(),
            "out": out,
            "method": "sparsegpt",
            "sparsity": 0.5,
            "calibration": "stdlib",
            "samples": 32,
            "seqlen": 256,
            "shards": shards,
            "eval": ("stdlib",),
            "eval_windows": 200,
        }
    )
