"""Finished runs of every kind over tiny models, each made once for all tests of reports."""

from types import SimpleNamespace

import pytest

from shardprune import PipelineRecipe, pipeline
from shardprune.report.progress import Reporter
from tests.support.dying import dying_at
from tests.support.running import rebuild_run, run, search_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with outputs, and the results of what made them by name."""
    from tests.support.tiny import make_model, make_tokens

    folder = tmp_path_factory.mktemp("reports")
    make_model(folder / "model", "llama-3.1")
    make_tokens(folder / "tokens.npy")
    tokens = str(folder / "tokens.npy")
    measured = {"eval": [tokens], "report": True}
    pipeline_recipe = {
        "model": str(folder / "model"),
        "out": str(folder / "pipeline"),
        "backend": "local",
        "threads": 1,
        "prune": {"sparsity": 0.5, "calibration": tokens, "samples": 12, "seqlen": 24, "wave": 4, "eval": tokens},
        "recover": {
            **{"data": tokens, "length": 24, "steps": 4, "batch": 4, "keep_sparsity": True, "zero": 1},
            **{"held_out": 0.2, "checkpoint_every": 2, "eval": tokens, "seqlen": 24},
        },
        "evaluate": {"perplexity": tokens, "seqlen": 24, "windows": 2},
    }
    results = {
        "owl": run(folder, "owl", sparsity=0.6, allocation="owl", outlier_m=2.0, **measured),
        "wanda": run(folder, "wanda", method="wanda", sparsity=0.5, measure_error=False, **measured),
        "rebuilt": rebuild_run(folder, "rebuilt", "wanda", rebuild_threshold=0.5, **measured),
        "composite": run(folder, "composite", sparsity=0.5, structured=0.2, **measured),
        "mop": search_run(folder, "mop", path="LG", **measured),
        "interrupted": _interrupted(folder, sparsity=0.5, **measured),
        **pipeline(PipelineRecipe.checked(pipeline_recipe), Reporter(quiet=True)),
    }
    return SimpleNamespace(folder=folder, results=results)


def _interrupted(folder, **fields):
    """A run whose driver was killed while it wrote its third layer, and which was started again."""
    with dying_at(2), pytest.raises(KeyboardInterrupt):
        run(folder, "interrupted", **fields)
    return run(folder, "interrupted", **fields)
