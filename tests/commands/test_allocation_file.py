"""Allocations that a run leaves in its output, and that another one takes."""

import json

import pytest

from shardprune.cli import main
from shardprune.errors import InputError
from shardprune.solvers.pattern import Unstructured
from tests.support.running import run
from tests.support.tiny import differing, load_tensors


@pytest.fixture(scope="module")
def owl(folder, tmp_path_factory):
    """A run whose layers give up different shares."""
    out = tmp_path_factory.mktemp("owl") / "o"
    return out, run(folder, out, sparsity=0.6, allocation="owl", outlier_m=3.0)


def test_a_run_leaves_what_every_projection_gave_up(owl):
    out, result = owl
    content = json.loads((out / "allocation.json").read_text())
    assert content["version"] == 1
    assert content["projections"] == [
        {"layer": report.layer, "name": report.name, "sparsity": report.target}
        for report in result.sparsity.projections
    ]
    with pytest.raises(SystemExit, match="^0$"):
        main(["check", str(out)])


def test_what_another_run_gave_up_is_given_up_again_to_the_weight(folder, owl, tmp_path):
    out, first = owl
    again = run(folder, tmp_path / "o", sparsity=0.6, allocation_file=str(out / "allocation.json"))
    assert differing(out, tmp_path / "o") == []
    assert [report.outliers for report in again.sparsity.projections] == [None] * len(first.sparsity.projections)
    assert (tmp_path / "o" / "allocation.json").read_bytes() == (out / "allocation.json").read_bytes()
    other = run(folder, tmp_path / "alps", method="alps", sparsity=0.6, allocation_file=str(out / "allocation.json"))
    tensors = load_tensors(tmp_path / "alps")
    for report in other.sparsity.projections:
        weight = tensors[f"model.layers.{report.layer}.{report.name}.weight"]
        assert int((weight == 0).sum()) == Unstructured().zeros(*weight.shape, report.target)


def test_what_is_written_there_makes_the_run_not_where_it_lies(folder, owl, tmp_path):
    content = json.loads((owl[0] / "allocation.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "b.json").write_text(json.dumps(content, indent=3))
    first, second = content["projections"][:2]  # of as many weights or not, the mean stays within what is allowed
    first["sparsity"], second["sparsity"] = first["sparsity"] + 1e-5, second["sparsity"] - 1e-5
    (tmp_path / "c.json").write_text(json.dumps(content))
    prints = [
        run(folder, tmp_path / name, sparsity=0.6, allocation_file=str(tmp_path / f"{name}.json")).fingerprint
        for name in "abc"
    ]
    assert prints[0] == prints[1] != prints[2]


def changed(content, how):
    projections = content["projections"]
    if how == "lacks":
        del projections[5]
    elif how == "twice":
        projections.append(projections[5])
    elif how == "unknown":
        projections[5]["name"] = "other\n"
    elif how == "range":
        projections[5]["sparsity"] = 1.0
    elif how == "mean":
        for share in projections:
            share["sparsity"] = 0.55
    elif how == "version":
        content["version"] = 2
    return content


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("lacks", r"lacks layer 0 \"mlp.up_proj\"; give that of a run on the same model"),
        ("twice", r"names twice layer 0 \"mlp.up_proj\""),
        ("unknown", r"names a projection that the model has not: layer 0 \"other\\n\""),
        ("range", "holds 1.0 as projections.5.sparsity; use less than 1"),
        ("mean", "has a mean sparsity of 0.5500, not of 0.6 as asked for"),
        ("version", "holds 2 as version; use 1"),
    ],
)
def test_a_file_that_does_not_fit_is_bad_input(folder, owl, tmp_path, how, message):
    content = changed(json.loads((owl[0] / "allocation.json").read_text()), how)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"^allocation_file: .*{message}") as wrong:
        run(folder, tmp_path / "o", sparsity=0.6, allocation_file=str(tmp_path / "a.json"))
    assert "\n" not in str(wrong.value)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 0.6}, "does not exist"),
        ({"sparsity": 0.6, "allocation": "owl"}, "does not go with allocation owl"),
        ({"pattern": "2:4"}, "does not go with pattern 2:4"),
        ({"sparsity": 0.6, "structured": 0.2}, "does not go with structured"),
    ],
)
def test_where_it_does_not_go_is_said(folder, tmp_path, fields, message):
    with pytest.raises(InputError, match=f"^allocation_file: .*nowhere.json' {message}"):
        run(folder, tmp_path / "o", allocation_file=str(tmp_path / "nowhere.json"), **fields)
