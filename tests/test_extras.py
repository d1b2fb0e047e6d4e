"""The extras in pyproject.toml: each brings the packages that commands look for, `all` brings all, the core none."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from shardprune.extras import PACKAGES

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOT_IN_ALL = {"all", "mlflow", "test", "wandb"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def brought(lines: list[str]) -> set[str]:
    """The distributions that requirements bring, as far as they are installed."""
    found: set[tuple[str, str]] = set()
    left = [(plain(line.name), extra) for line in map(Requirement, lines) for extra in ("", *line.extras)]
    while left:
        name, extra = left.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        if name == "shardprune":
            needed = EXTRAS[extra] if extra else []
        else:
            try:
                needed = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
        for line in map(Requirement, needed):
            if line.marker is None or line.marker.evaluate({"extra": extra}):
                left += [(plain(line.name), own) for own in ("", *line.extras)]
    return {name for name, _ in found}


@pytest.mark.parametrize("extra", sorted(PACKAGES.keys() - NOT_IN_ALL))
def test_an_extra_brings_the_packages_that_are_looked_for(extra):
    distributions = metadata.packages_distributions()
    there = brought(EXTRAS[extra])
    for package in PACKAGES[extra]:
        assert there & {plain(name) for name in distributions[package]}, package


@pytest.mark.parametrize("extra", sorted(PACKAGES.keys() - NOT_IN_ALL))
def test_the_core_lacks_something_of_each(extra):
    distributions = metadata.packages_distributions()
    there = brought(PROJECT["dependencies"])
    assert not all(there & {plain(name) for name in distributions[package]} for package in PACKAGES[extra])


def test_all_brings_the_other_extras():
    assert brought(["shardprune[all]"]) >= brought([f"shardprune[{extra}]" for extra in EXTRAS.keys() - NOT_IN_ALL])
    assert set(PACKAGES) < EXTRAS.keys()
