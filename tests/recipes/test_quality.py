"""The dial from fast to best, and the targets that follow from the calibration text."""

import pytest

from shardprune.errors import InputError
from shardprune.planning.recipe import PlanRecipe
from shardprune.recipes.prune import PruneRecipe
from tests.recipes.test_prune import RECIPES

NAMES = ("method", "allocation", "reconstruct", "damping")
AT_70 = {"sparsity": 0.7}


def recipe(**fields) -> PruneRecipe:
    return PruneRecipe.checked({"model": "m", "out": "o", **fields})


@pytest.mark.parametrize(
    ("fields", "stood_for"),
    [
        (AT_70, ("sparsegpt", "uniform", 0, 0.01)),
        (AT_70 | {"quality": "fast"}, ("sparsegpt", "uniform", 0, 0.01)),
        (AT_70 | {"quality": "balanced"}, ("sparsegpt", "uniform", 50, 0.01)),
        (AT_70 | {"quality": "best"}, ("alps", "fisher", 100, 0.1)),
        ({"sparsity": 0.49, "quality": "best"}, ("alps", "uniform", 100, 0.1)),
        ({"sparsity": "0.5", "quality": "best"}, ("alps", "fisher", 100, 0.1)),
        ({"sparsity": 0.995, "quality": "best"}, ("alps", "uniform", 100, 0.1)),
        ({"pattern": "2:4", "quality": "best"}, ("alps", "uniform", 100, 0.1)),
        ({"pattern": "2:4", "sparsity": 0.5, "quality": "balanced"}, ("sparsegpt", "uniform", 50, 0.01)),
        ({"pattern": "mixed:8", "sparsity": 0.75, "quality": "best"}, ("alps", "owl", 100, 0.1)),
        (AT_70 | {"allocation_file": "a.json", "quality": "best"}, ("alps", "uniform", 100, 0.1)),
        # what is given wins
        (AT_70 | {"quality": "best", "method": "wanda"}, ("wanda", "fisher", 100, 0.01)),
        (AT_70 | {"quality": "best", "reconstruct": 0, "allocation": "mosaic"}, ("alps", "mosaic", 0, 0.1)),
        (AT_70 | {"quality": "best", "rebuild": "barber"}, ("alps", "fisher", 100, 0.1)),
        (AT_70 | {"quality": "best", "damping": 0.03}, ("alps", "fisher", 100, 0.03)),
        # nothing becomes zero
        ({"structured": 0.2, "quality": "best"}, ("sparsegpt", "uniform", 100, 0.01)),
        ({"structured": 0.2, "sparsity": 0.7, "quality": "best"}, ("alps", "fisher", 100, 0.1)),
        ({"structured": 0.4, "sparsity": 0.7, "quality": "best"}, ("alps", "fisher", 100, 0.1)),  # half of what is left
        ({"structured": 0.4, "sparsity": 0.69, "quality": "best"}, ("alps", "uniform", 100, 0.1)),
        ({"structured": 0.7, "sparsity": 0.7, "quality": "best"}, ("alps", "uniform", 100, 0.1)),
    ],
)
def test_a_quality_stands_for_fields(fields, stood_for):
    for made in (recipe(**fields), recipe(**recipe(**fields).record())):  # a recorded recipe is the same again
        assert tuple(getattr(made, name) for name in NAMES) == stood_for
        assert made.quality == fields.get("quality", "fast")
    if "structured" not in fields and "rebuild" not in fields:
        assert PlanRecipe.checked({"model": "m", **fields}).chosen == dict(zip(NAMES, stood_for, strict=True))


def test_a_plan_without_a_sparsity_has_the_one_that_it_takes():
    assert PlanRecipe.checked({"model": "m", "quality": "best"}).method == "alps"


def test_the_same_fields_are_the_same_run_whatever_stood_for_them():
    dialled = recipe(**AT_70, quality="best").shape()
    assert "quality" not in dialled
    assert dialled == recipe(**AT_70, method="alps", allocation="fisher", reconstruct=100, damping=0.1).shape()


@pytest.mark.parametrize(
    ("name", "target", "allocation"),
    [("50", 0.5, "fisher"), ("60", 0.6, "fisher"), ("70", 0.7, "fisher"), ("2of4", 0.5, "uniform")],
)
def test_the_recipes_of_the_repository_are_the_best(name, target, allocation):
    loaded = PruneRecipe.load(RECIPES / f"best-{name}.yaml", {"out": "o"})
    assert loaded.quality == "best"
    assert tuple(getattr(loaded, name) for name in NAMES) == ("alps", allocation, 100, 0.1)
    assert (loaded.zeroing.target, loaded.pattern) == (target, "2:4" if name == "2of4" else "unstructured")


def test_another_quality_is_refused_in_a_line():
    with pytest.raises(InputError, match=r"^quality: 'good' is not allowed; use one of fast, balanced, best$"):
        recipe(**AT_70, quality="good")
    with pytest.raises(
        InputError, match=r"^samples: 7 is too few for reconstruct, which holds out some; use at least 8$"
    ):
        recipe(**AT_70, quality="best", samples=7)


SELF = AT_70 | {"calibration": "self"}


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        (AT_70, "own"),
        (SELF, "stream"),
        (AT_70 | {"calibration": "self:runs/text"}, "stream"),
        (AT_70 | {"calibration": ["wikitext2", "self"]}, "stream"),
        (SELF | {"pattern": "2:4", "sparsity": None}, "stream"),
        (SELF | {"targets": "own"}, "own"),
        (AT_70 | {"targets": "stream"}, "stream"),
        # what hinders it
        (SELF | {"reconstruct": 10}, "own"),
        (SELF | {"quality": "best"}, "own"),
        (SELF | {"rebuild": "barber"}, "own"),
        (SELF | {"damping": "auto"}, "own"),
        (SELF | {"samples": 7}, "own"),
        (SELF | {"structured": 0.2, "sparsity": None}, "own"),
    ],
)
def test_targets_follow_from_the_text(fields, targets):
    fields = {name: value for name, value in fields.items() if value is not None}
    made = recipe(**fields)
    assert made.decided == {"targets": targets}
    assert made.improving.stream_targets == (targets == "stream")
    if "structured" not in fields and "rebuild" not in fields:
        assert PlanRecipe.checked({"model": "m", **fields}).decided == {"targets": targets}
