"""The demo: the bundled model, the standard library as text, no network."""

from importlib.resources import files

from shardprune.recipes.prune import Recipe


def bundled_model() -> str:
    """The directory of the model inside the package: a small Llama trained on the standard library."""
    return str(files("shardprune") / "assets" / "stdlib-4m")


def demo_recipe(out: str, shards: int) -> Recipe:
    """SparseGPT to 50 % on Ray shards, measured on held-out modules."""
    return Recipe.checked(
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
