"""Sparsities of layers and projections that a file gives by hand."""

import json

import pytest

from shardprune.errors import InputError
from tests.support.running import run

NAMED = {"layer": 2, "name": "mlp.down_proj", "sparsity": 0.25}


def given(tmp_path, **content):
    (tmp_path / "shares.json").write_text(json.dumps({"version": 1, **content}))
    return str(tmp_path / "shares.json")


def test_layers_and_projections_have_what_the_file_says_and_others_the_rest(folder, tmp_path):
    file = given(tmp_path, layers=[{"layer": 0, "sparsity": 0.0}, {"layer": 2, "sparsity": 0.75}], projections=[NAMED])
    shares = json.loads((tmp_path / "shares.json").read_text())
    file = given(tmp_path, **{**shares, "others": "equal"})
    result = run(folder, tmp_path / "out", sparsity=0.5, method="magnitude", allocation_file=file)
    targets = {(report.layer, report.name): report.target for report in result.sparsity.projections}
    weights = {(report.layer, report.name): report.achieved for report in result.sparsity.projections}
    others = {target for (layer, _), target in targets.items() if layer in (1, 3)}
    assert len(others) == 1
    for (layer, name), target in targets.items():
        if layer not in (1, 3):
            assert target == {0: 0.0, 2: 0.25 if name == "mlp.down_proj" else 0.75}[layer]
        assert weights[layer, name] == pytest.approx(target, abs=2e-3)
    assert result.sparsity.achieved == pytest.approx(0.5, abs=2e-3)
    again = run(folder, tmp_path / "again", sparsity=0.5, allocation_file=str(tmp_path / "out" / "allocation.json"))
    assert [report.target for report in again.sparsity.projections] == list(targets.values())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"layers": [{"layer": 0, "sparsity": 0.5}]}, 'lacks layer 1 "self_attn.q_proj"; give that of a run'),
        ({"layers": [{"layer": 9, "sparsity": 0.5}]}, "has a layer of which no projection is pruned: 9"),
        ({"layers": [{"layer": 0, "sparsity": 0.5}] * 2}, "has a layer twice: 0"),
        ({"projections": [NAMED] * 2, "others": "equal"}, 'names twice layer 2 "mlp.down_proj"'),
        (
            {"layers": [{"layer": index, "sparsity": 0.0} for index in range(3)], "others": "equal"},
            "leaves the others a sparsity of 2.0000 for 0.5 in all; use 0 to 0.99",
        ),
        (
            {"projections": [{**NAMED, "sparsity": None, "curve": [[0.4, 0.1], [0.6, 0.2]]}], "others": "equal"},
            "has curves, which do not go with layers or others",
        ),
        ({"others": "none"}, "holds 'none' as others; use 'equal'"),
    ],
)
def test_a_file_that_cannot_be_followed_is_one_line(folder, tmp_path, content, problem):
    file = given(tmp_path, **content)
    with pytest.raises(InputError, match="^allocation_file: ") as caught:
        run(folder, tmp_path / "out", sparsity=0.5, allocation_file=file)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
