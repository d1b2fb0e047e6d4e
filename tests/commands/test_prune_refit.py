"""Runs that fit kept weights, and what their results say of solvers in iterations."""

import pytest

from shardprune.solvers.methods import PENALTIES, PER_PENALTY, REFIT_STEPS, SUPPORT_STEPS
from tests.support.running import run
from tests.support.tiny import differing, load_tensors


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_refit_keeps_the_first_layer_s_zeros_and_loses_less(folder, method, tmp_path):
    fields = {"method": method, "sparsity": 0.6}
    plain = run(folder, tmp_path / "plain", **fields).sparsity.projections
    refit = run(folder, tmp_path / "refit", **fields, refit=True).sparsity.projections
    before, after = load_tensors(tmp_path / "plain"), load_tensors(tmp_path / "refit")
    for one, other in zip(plain, refit, strict=True):
        assert (one.refit_steps, other.refit_steps) == (None, REFIT_STEPS)
        assert other.achieved == one.achieved
        name = f"model.layers.{one.layer}.{one.name}.weight"
        if one.layer == 0:  # later layers have other inputs
            assert ((before[name] == 0) == (after[name] == 0)).all()
            assert other.error < one.error


def test_a_refit_needs_no_measured_errors_and_no_one_process(folder, tmp_path):
    fields = {"method": "wanda", "sparsity": 0.6, "refit": True}
    run(folder, tmp_path / "measured", **fields)
    run(folder, tmp_path / "plain", **fields, measure_error=False, shards=3, weights="streamed")
    assert differing(tmp_path / "measured", tmp_path / "plain") == []


def test_alps_says_its_iterations_and_loses_less_than_sparsegpt(folder, tmp_path):
    alps = run(folder, tmp_path / "alps", method="alps", sparsity=0.6).sparsity.projections
    sparsegpt = run(folder, tmp_path / "sparsegpt", sparsity=0.6).sparsity.projections
    for one, other in zip(alps, sparsegpt, strict=True):
        assert (one.iterations, one.refit_steps) == (len(PENALTIES) * PER_PENALTY, SUPPORT_STEPS)
        assert (one.damping, one.retries, one.sweep) == (0.01, 0, None)
        assert (other.iterations, other.refit_steps) == (None, None)
        if one.layer == 0:
            assert one.error < other.error
