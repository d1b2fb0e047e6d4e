"""Outputs that would be lost with a submitted job."""

import pytest

from shardprune.errors import InputError
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.prune import PruneRecipe
from shardprune.recipes.recover import RecoverRecipe

PRUNING = {"model": "m", "sparsity": 0.5}
LOST = {
    "prune": (PruneRecipe, {**PRUNING, "out": "runs/x"}, "out"),
    "recover": (RecoverRecipe, {"model": "m", "data": "stdlib", "out": "s3://bucket/x", "state": "x"}, "state"),
    "evaluate": (EvaluateRecipe, {"model": "m", "perplexity": "stdlib", "out": "."}, "out"),
    "pipeline": (PipelineRecipe, {"model": "m", "prune": {"sparsity": 0.5}, "evaluate": {}, "out": "x"}, "out"),
}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The directory of a job that was submitted with a working directory."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    return copy


@pytest.mark.parametrize("case", LOST)
def test_what_a_job_would_write_beside_its_code_is_refused(case, copy):
    recipe, values, field = LOST[case]
    with pytest.raises(InputError) as wrong:
        recipe.checked(values)
    assert str(wrong.value) == (
        f"{field}: {values[field]!r} would be lost with this job's copy of the working directory; "
        "use an absolute path or a URL"
    )


@pytest.mark.parametrize("out", ["/data/runs/x", "s3://bucket/runtime_resources/x", "~/x", "../../../../x"])
def test_other_places_are_accepted(out, copy):
    assert PruneRecipe.checked({**PRUNING, "out": out}).out == out


def test_a_relative_output_is_fine_elsewhere():
    assert PruneRecipe.checked({**PRUNING, "out": "runs/x"}).out == "runs/x"
