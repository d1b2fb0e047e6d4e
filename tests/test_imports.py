"""The order of the packages: an import goes down, or stays inside its package."""

import ast
from pathlib import Path

import pytest

import shardprune

ROOT = Path(shardprune.__file__).parent
FLOORS = (
    {"__main__"},
    {"cli"},
    {"commands"},
    {"planning", "evaluation"},
    {"cluster"},
    {"recovery"},
    {"shard", "recipes", "report"},
    {"model"},
    {"solvers", "storage"},
    {"process"},
    {"extras", "signals", "standard_streams"},
    {"errors"},
    {"printable"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def _imported(file: Path) -> set[str]:
    """The parts of shardprune that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module != "shardprune" else [f"shardprune.{a.name}" for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("shardprune.")}
    return found


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_go_down_only(file):
    own = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":  # of the package: it hands out what the commands are in Python
        return
    above = {name for name in _imported(file) if name != own and FLOOR[name] <= FLOOR[own]}
    assert not above, f"{own} imports {above}, which are not below it"


def test_every_part_has_its_floor():
    parts = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == FLOOR.keys()
