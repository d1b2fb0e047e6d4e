"""Runs with a damping of their own, and with one that held-out windows choose."""

import pytest

from shardprune.solvers.methods import DAMPINGS
from tests.support.running import run
from tests.support.tiny import differing, load_tensors


def test_a_given_damping_is_the_solver_s(folder, tmp_path):
    for method in ("sparsegpt", "alps"):
        result = run(folder, tmp_path / method, method=method, sparsity=0.6, damping=0.25)
        assert {report.damping for report in result.sparsity.projections} == {0.25}
    run(folder, tmp_path / "plain", sparsity=0.6)
    assert differing(tmp_path / "plain", tmp_path / "sparsegpt")


@pytest.fixture(scope="module")
def chosen(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("chosen") / "o"
    return out, run(folder, out, sparsity=0.7, damping="auto")


def test_a_chosen_damping_stands_in_the_result(chosen):
    _, result = chosen
    dampings = [report.damping for report in result.sparsity.projections]
    assert set(dampings) <= set(DAMPINGS)
    assert len(set(dampings)) > 1
    assert result.calibration.held_out == 4
    assert result.recipe["damping"] == "auto"
    assert result.sparsity.achieved == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("fields", [{"shards": 3, "weights": "streamed"}, {"measure_error": False}], ids=str)
def test_layout_and_memory_do_not_change_a_bit(folder, chosen, fields, tmp_path):
    run(folder, tmp_path / "o", sparsity=0.7, damping="auto", **fields)
    assert differing(chosen[0], tmp_path / "o") == []


def test_replicas_change_only_the_order_of_sums(folder, chosen, tmp_path):
    result = run(folder, tmp_path / "o", sparsity=0.7, damping="auto", replicas=3, shards=2)
    assert [report.damping for report in result.sparsity.projections] == [
        report.damping for report in chosen[1].sparsity.projections
    ]
    one, three = load_tensors(chosen[0]), load_tensors(tmp_path / "o")
    assert all(((one[name] == 0) == (three[name] == 0)).all() for name in one)
