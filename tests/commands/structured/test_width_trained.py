"""Narrowed layers that are trained towards the dense ones."""

import pytest
import torch

from shardprune.errors import InputError
from shardprune.report.page.write import plots_of
from shardprune.report.progress import Reporter, Step
from tests.support.running import run
from tests.support.tiny import differing, load_tensors

NARROW = {"structured": 0.3}
TRAINED = {**NARROW, "reconstruct": 6}


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "o"
    return out, run(folder, out, **TRAINED)


def test_narrow_layers_come_nearer_and_stay_as_narrow(folder, trained, tmp_path):
    out, result = trained
    plain = run(folder, tmp_path / "o", **NARROW)
    steps = result.sparsity.improvements
    assert [(step.layer, step.step) for step in steps] == [(layer, "reconstruction") for layer in range(4)]
    assert steps[0].kept
    assert all(step.error_after < step.error_before for step in steps if step.kept)
    assert result.calibration.held_out == 4
    assert any(plot and plot.title.startswith("Error of layers") for plot in plots_of(result))
    assert result.structure.after == plain.structure.after
    before, after = load_tensors(tmp_path / "o"), load_tensors(out)
    assert {name: tensor.shape for name, tensor in before.items()} == {
        name: tensor.shape for name, tensor in after.items()
    }
    first = {
        name for name in after if name.startswith("model.layers.0.") and not torch.equal(before[name], after[name])
    }
    assert {name.split(".")[-2] for name in first} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    for layer, step in zip(result.structure.layers, steps, strict=True):
        assert (layer.errors == {}) == step.kept


def test_the_layout_does_not_change_a_bit(folder, trained, tmp_path):
    run(folder, tmp_path / "o", shards=3, weights="streamed", **TRAINED)
    assert differing(trained[0], tmp_path / "o") == []


def test_replicas_train_together(folder, trained, tmp_path):
    result = run(folder, tmp_path / "o", replicas=3, **TRAINED)
    assert [step.kept for step in result.sparsity.improvements] == [
        step.kept for step in trained[1].sparsity.improvements
    ]
    one, three = load_tensors(trained[0]), load_tensors(tmp_path / "o")
    assert all(torch.allclose(tensor, three[name], atol=1e-3) for name, tensor in one.items())


@pytest.mark.parametrize("correction", [True, False])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits_and_ends_where_its_work_does(
    folder, correction, dies_at_layer, tmp_path, monkeypatch
):
    fields = {**TRAINED, "correction": correction}
    whole = run(folder, tmp_path / "whole", **fields)
    assert any(step.kept for step in whole.sparsity.improvements)
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", **fields)
    steps, show = [], Reporter.show

    def noting(self, step: Step) -> None:
        steps.append((step.done, step.total))
        show(self, step)

    monkeypatch.setattr(Reporter, "show", noting)
    run(folder, tmp_path / "o", **fields)
    assert differing(tmp_path / "whole", tmp_path / "o") == []
    done, total = steps[-1]
    assert done == total


def test_layers_that_become_sparse_as_well_are_trained_once(folder, tmp_path):
    result = run(folder, tmp_path / "o", structured=0.2, sparsity=0.5, reconstruct=3)
    assert [step.layer for step in result.sparsity.improvements] == [0, 1, 2, 3]
    assert result.sparsity.achieved == pytest.approx(0.5, abs=0.01)


def test_too_few_windows_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"^samples: 7 is too few for reconstruct, which holds out some"):
        run(folder, tmp_path / "o", samples=7, **TRAINED)
