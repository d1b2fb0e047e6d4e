"""Runs over tiny models in this process. They leave reports to the tests of these."""

from shardprune import MopRecipe, RebuildRecipe, Recipe, mop, prune, rebuild
from shardprune.report.progress import Reporter


def run(folder, out, model="model", reporter=None, **fields):
    """Prune a tiny model in this process, quietly unless an output is given."""
    return prune(Recipe.checked(_values(folder, out, model, fields)), reporter or Reporter(quiet=True))


def rebuild_run(folder, out, sparse, model="model", **fields):
    """Rebuild the masks of a tiny model in this process, quietly."""
    values = _values(folder, out, model, {"sparse": str(folder / sparse), **fields})
    return rebuild(RebuildRecipe.checked(values), Reporter(quiet=True))


def search_run(folder, out, model="model", **fields):
    """Search over a tiny model in this process, quietly."""
    return mop(search_recipe(folder, out, model, **fields), Reporter(quiet=True))


def search_recipe(folder, out, model="model", **fields):
    """The recipe of such a search."""
    return MopRecipe.checked(_values(folder, out, model, fields))


def _values(folder, out, model, fields):
    return {
        "model": model if "://" in str(model) else str(folder / model),
        "out": out if "://" in str(out) else str(folder / out),
        "calibration": str(folder / "tokens.npy"),
        "samples": 12,
        "seqlen": 24,
        "wave": 4,
        "backend": "local",
        "threads": 1,
        "report": False,
        **fields,
    }
