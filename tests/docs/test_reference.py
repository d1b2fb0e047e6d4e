"""docs/reference.md is what the classes say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from docs.make_reference import page
from shardprune.cli import SETTINGS
from shardprune.cluster.layout import plan_layout
from shardprune.cluster.placement import Placement
from shardprune.commands.calibration import CalibrationText
from shardprune.commands.fingerprint import fingerprint_of
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.identity import identifying_fields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.shard.spec import WorkerSettings

DOCS = Path(__file__).resolve().parents[2] / "docs"
BESIDE = {
    "allocation_file",
    "statistics",
    "model",
    "sparse",
    "calibration",
    "self_temperature",
    "self_bos",
    "self_batch",
    "samples",
    "seed",
    "propagation",
}  # by what is made of them: tokens, segments
NEEDED = {
    PruneRecipe: {"sparsity": 0.5},
    RebuildRecipe: {"sparse": "s"},
    MopRecipe: {"remove": 0.3},
    ExpertsRecipe: {"remove": 0.3},
}


def test_the_page_is_up_to_date():
    assert (DOCS / "reference.md").read_text() == page(), "run `make docs`"


def test_every_field_is_described():
    text = page()
    for name, settings in SETTINGS.items():
        for field in settings.model_fields:
            assert f"`{field}`" in text, (name, field)


def test_links_and_columns_fit():
    text = page()
    headings = [line.removeprefix("## ").lower() for line in text.splitlines() if line.startswith("## ")]
    assert len(set(headings)) == len(headings)
    assert set(re.findall(r"\(#(.*?)\)", text)) <= set(headings)
    assert all((DOCS / file).is_file() for file in re.findall(r"\((\w+\.md)\)", text))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("recipe", NEEDED, ids=lambda recipe: recipe.command)
def test_what_makes_two_runs_the_same_is_what_the_fingerprint_covers(recipe):
    """A field changes a run's fingerprint where the page says so, and only there."""
    layout = plan_layout(4, 8, "exact", 1, 1, None)
    workers = WorkerSettings("m", "cpu", "float32", threads=1, streamed=False, activations="auto")
    decided = Placement(layout, "exact", workers, wave=1, out="o")

    text = CalibrationText([2], {0: torch.zeros(2, 4, dtype=torch.int64)}, None)

    def fingerprint(settings):
        placement = replace(decided, wave=settings.sequences_per_wave)
        return fingerprint_of(settings, placement, "identity", None, text)

    settings = recipe.checked({"model": "m", "out": "o", **NEEDED[recipe]})
    named = identifying_fields(recipe)
    for name, field in recipe.model_fields.items():
        if name in BESIDE:
            assert name in named
            continue
        choices = [choice for choice in recipe.choices(name) if choice != field.default]
        value = getattr(settings, name)
        if isinstance(value, bool):
            other = not value
        elif choices:
            other = choices[0]
        elif isinstance(value, tuple):
            other = ("1:4",)
        else:
            other = value + 0.125 if isinstance(value, float) else value + 1 if isinstance(value, int) else "1:4"
        if name in {"sparsity", "structured", "remove", "segments", "wave"}:
            other = 0.75 if name in {"sparsity", "structured", "remove"} else 1
        if (recipe, name) == (ExpertsRecipe, "keep"):  # a number, without a default
            other = 3
        changed = settings.model_copy(update={name: other})
        assert (fingerprint(changed) != fingerprint(settings)) == (name in named), name
