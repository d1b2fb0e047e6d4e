"""The names that `shardprune` offers in Python."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import shardprune
from shardprune.recipes.commands import public_places


def test_editors_see_the_names_of_the_table():
    tree = ast.parse(Path(shardprune.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.col_offset == 4]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in imports
        for alias in node.names
        if alias.asname  # what is imported under a name of its own is offered to others
    }
    assert seen.pop("Recipe") == "shardprune.recipes.prune.PruneRecipe"
    assert seen == {name: f"{place}.{name}" for name, place in public_places().items()}


@pytest.mark.parametrize(("name", "place"), public_places().items())
def test_a_name_is_the_object_of_its_module(name, place):
    assert getattr(shardprune, name) is getattr(import_module(place), name)


def test_unknown_names_are_attribute_errors():
    assert shardprune.Recipe is shardprune.PruneRecipe
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = shardprune.prun
