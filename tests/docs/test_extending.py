"""docs/extending.md word for word: its files and rows go into a copy of the package, its commands run there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Page
from tests.support.tiny import load_tensors

PAGE = ROOT / "docs" / "extending.md"
SMALLER = {
    "shardprune": ["--samples", "4", "--seqlen", "32", "--eval-windows", "2", "--no-report"],
    "olmo2": ["tests/model/test_skeleton.py", "tests/model/structure"],  # of all the tests that know families
}
RUN = """
import json, sys
import pytest
import shardprune
from shardprune.cli import main

codes = []
for kind, content in json.load(open("steps.json")):
    if kind == "python":
        exec(content, {})
        continue
    try:
        codes.append(int(pytest.main(content) if kind == "pytest" else main(content)))
    except SystemExit as end:
        codes.append(int(end.code or 0))
    print(content, codes[-1], flush=True)
print(json.dumps([shardprune.__file__, codes]))
"""


def changes() -> list[tuple[str, str, str]]:
    """The files and rows of the page: path, language, text."""
    return re.findall(r"`([\w/]+\.py)`:\n\n```(python|diff)\n(.*?)^```", PAGE.read_text(), re.M | re.S)


def apply(folder: Path, path: str, language: str, text: str) -> None:
    file = folder / path
    if language == "python":
        assert not file.exists(), f"{path} is there already"
        file.write_text(text)
        return
    for hunk in text.split("@@\n"):
        before, after = (
            "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[:1] in ("", " ", sign)) for sign in "-+"
        )
        content = file.read_text()
        assert content.count(f"\n{before}") == 1, f"{path} has no such lines: {before}"
        file.write_text(content.replace(f"\n{before}", f"\n{after}"))


def steps() -> list[tuple[str, str | list[str]]]:
    """The commands and programs of the page in their order, small."""
    found: list[tuple[str, str | list[str]]] = []
    for block in Page.read(PAGE).blocks:
        if block.language == "python" and block.file is None:
            found.append(("python", block.text))
        else:
            for _, words, _ in block.commands():
                if words[0] == "shardprune":
                    found.append(("shardprune", [*words[1:], *SMALLER["shardprune"]]))
                elif words[:3] == ["python", "-m", "pytest"]:
                    found.append(("pytest", ["-q", *words[3:], *SMALLER.get(words[-1], [])]))
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package and its tests with what the page adds, in which the page's commands have run."""
    folder = tmp_path_factory.mktemp("extending")
    for name in ("shardprune", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for change in changes():
        apply(folder, *change)
    (folder / "steps.json").write_text(json.dumps(steps()))
    (folder / "run.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    package, codes = json.loads(done.stdout.splitlines()[-1])
    assert Path(package).is_relative_to(folder)
    assert codes
    assert not any(codes), done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def result(copy: Path, name: str) -> dict:
    return json.loads((copy / "runs" / name / "result.json").read_text())


def test_a_new_method_prunes(copy):
    found = result(copy, "ria")
    assert found["recipe"]["method"] == "ria"
    assert found["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-4)
    assert found["perplexity"]["stdlib"]["after"] > found["perplexity"]["stdlib"]["before"]


def test_a_new_allocation_is_met(copy):
    found = result(copy, "atp")
    layers = [layer["target"] for layer in found["sparsity"]["layers"]]
    assert layers == sorted(layers)
    assert layers[-1] - layers[0] == pytest.approx(0.16)
    assert found["sparsity"]["achieved"] == pytest.approx(0.7, abs=1e-4)


def test_a_new_family_becomes_smaller_and_keeps_its_heads(copy):
    for name, layers in ("olmo2-structured", 4), ("olmo2-mop", 3):
        config = json.loads((copy / "runs" / name / "config.json").read_text())
        assert config["architectures"] == ["Olmo2ForCausalLM"]
        assert config["num_hidden_layers"] == layers
        assert config["intermediate_size"] < 96
        assert config["num_attention_heads"] == 8
    tensors = load_tensors(copy / "runs" / "olmo2-structured")
    assert (tensors["model.layers.0.mlp.up_proj.weight"] == 0).any()


def test_the_page_names_what_there_is(copy):
    paths = re.findall(r"`((?:shardprune|tests)/[a-z0-9_/]+\.py)`", PAGE.read_text())
    assert len(paths) > 10
    assert [path for path in paths if not (copy / path).is_file()] == []
