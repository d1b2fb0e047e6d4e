"""The dial where the model decides what it stands for."""

import pytest

from shardprune import Recipe, prune
from shardprune.errors import InputError
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.report.progress import Reporter
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.tiny import make_tokens

BEST = {"sparsity": 0.6, "quality": "best"}


class Saying(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def test_the_best_quality_of_a_mixture_shares_out_by_outliers_and_says_so(tmp_path):
    model = make_architecture(tmp_path / "model", "qwen3_moe", MIXTURES["qwen3_moe"])
    make_tokens(tmp_path / "tokens.npy")
    fields = BEST | {"model": str(model), "out": str(tmp_path / "out"), "calibration": str(tmp_path / "tokens.npy")}
    fields |= {"samples": 8, "seqlen": 24, "backend": "local", "threads": 1, "report": False, "reconstruct": 0}
    reporter = Saying()
    result = prune(Recipe.checked(fields), reporter)
    assert (result.recipe["method"], result.recipe["allocation"]) == ("alps", "owl")
    line = "quality best: allocation owl, as experts have no error curves yet"
    assert line in reporter.said

    planned = plan(PlanRecipe.checked({"model": str(model), "samples": 8, "seqlen": 24, **BEST}))
    assert (planned.recipe.allocation, planned.recipe.instead) == ("owl", line)
    with pytest.raises(InputError, match="^allocation: fisher measures no experts yet"):
        plan(PlanRecipe.checked({"model": str(model), "sparsity": 0.6, "allocation": "fisher"}))
