"""What a recipe's model decides of it: a plan says and refuses what the run does."""

import re

import pytest

from shardprune.errors import InputError
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from tests.support.architectures import DENSE, MIXTURES, make_architecture
from tests.support.running import run
from tests.support.tiny import make_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitting")
    make_model(folder / "llama", "llama-3.1")
    make_architecture(folder / "granite", "granite", DENSE["granite"])
    make_architecture(folder / "mixtral", "mixtral", MIXTURES["mixtral"])
    return folder


SHORT = {"samples": 8, "seqlen": 8}


@pytest.mark.parametrize(("model", "targets"), [("llama", "stream"), ("granite", "own"), ("mixtral", "own")])
def test_a_plan_decides_the_targets_as_the_run_does(models, model, targets, tmp_path):
    fields = {**SHORT, "sparsity": 0.5, "calibration": "self"}
    planned = plan(PlanRecipe.checked({**fields, "model": str(models / model)}))
    result = run(models, tmp_path / "o", model=model, **fields)
    assert planned.recipe.decided["targets"] == result.recipe["targets"] == targets
    steps = {task.improving.stream_targets for one in planned.plans for task in one.candidate.tasks}
    assert steps == {targets == "stream"}


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        ("granite", {"targets": "stream"}, "targets: .* model_type 'granite' are not known"),
        ("llama", {"expert_tokens": "all"}, "expert_tokens: 'all' has no effect: the model has no experts"),
        ("llama", {"expert_chunks": 2}, "expert_chunks: 2 has no effect: the model has no experts"),
        ("llama", {"pattern": "mixed:7", "allocation": "owl"}, "pattern: mixed:7 does not fit self_attn.q_proj"),
        ("llama", {"replicas": 5, "reconstruct": 1}, "replicas: 5 is more than the 4 of 8 samples that are not held"),
    ],
)
def test_a_plan_refuses_what_the_run_does(models, model, fields, message, tmp_path):
    with pytest.raises(InputError, match=f"^{message}") as refused:
        run(models, tmp_path / "o", model=model, calibration="stdlib", **{**SHORT, "sparsity": 0.5, **fields})
    recipe = PlanRecipe.checked({**SHORT, "sparsity": 0.5, "model": str(models / model), "gpus": 8, **fields})
    with pytest.raises(InputError, match=f"^{re.escape(str(refused.value))}$"):
        plan(recipe)
