"""The dial where the model decides what it stands for."""

from shardprune import Recipe, prune
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import make_tokens

BEST = {"sparsity": 0.6, "quality": "best"}


def test_the_best_quality_of_a_mixture_shares_out_by_error_curves_as_its_plan_does(tmp_path):
    model = make_architecture(tmp_path / "model", "qwen3_moe", MIXTURES["qwen3_moe"])
    make_tokens(tmp_path / "tokens.npy")
    fields = BEST | {"model": str(model), "out": str(tmp_path / "out"), "calibration": str(tmp_path / "tokens.npy")}
    fields |= {"samples": 8, "seqlen": 24, "backend": "local", "threads": 1, "report": False, "reconstruct": 0}
    result = prune(Recipe.checked(fields))
    assert (result.recipe["method"], result.recipe["allocation"]) == ("alps", "fisher")
    assert len({report.target for report in result.sparsity.projections}) > 5

    planned = plan(PlanRecipe.checked({"model": str(model), "samples": 8, "seqlen": 24, **BEST}))
    assert planned.recipe.allocation == "fisher"
    assert all(one.candidate.seconds.curves > 0 for one in planned.plans)
