"""The comparison of two checkouts sees a change of the last bits, and none where there is none."""

import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.same_bits import differing, main

ROOT = Path(__file__).parents[1]


@pytest.mark.long
def test_a_changed_solver_is_seen(tmp_path, monkeypatch, capsys):
    def compare(before: Path, after: Path) -> tuple[int, str]:
        options = ["--backend", "local", "--only", "sparsegpt", "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["same_bits", str(before), str(after), *options])
        return main(), capsys.readouterr().out

    changed = tmp_path / "changed"
    shutil.copytree(ROOT / "shardprune", changed / "shardprune", ignore=shutil.ignore_patterns("__pycache__"))
    solver = changed / "shardprune" / "solvers" / "methods.py"
    solver.write_text(solver.read_text().replace("DAMPING = 0.01 ", "DAMPING = 0.0100001 "))
    code, table = compare(ROOT, changed)
    assert code == 1
    assert "| llama | sparsegpt | local | 39 | no | no |" in table
    assert "    model.layers.3.mlp.down_proj.weight\n" in table
    assert "    sparsity.projections[0].damping: 0.01 -> 0.0100001\n" in table
    assert "embed_tokens" not in table
    code, table = compare(ROOT, ROOT)
    assert code == 0
    assert "| llama | sparsegpt | local | 39 | yes | yes |" in table


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0}]}, []),
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.5}]}, ["a[1].b: 2.0 -> 2.5"]),
        ({"a": 1}, {"a": 1, "b": 2}, ["b: None -> 2"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a: [1] -> [1, 2]"]),
    ],
)
def test_differences_are_named(before, after, names):
    assert differing(before, after) == names
