"""Steps beyond pruning on models whose layers are of several kinds, or have mixers side by side."""

import pytest

from shardprune.commands.check import check
from shardprune.planning.costs import Costs
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from shardprune.planning.workload import read_model
from shardprune.report.progress import Reporter
from tests.support.architectures import MIXED, make_architecture
from tests.support.running import run
from tests.support.tiny import make_tokens

MIXERS = {"falcon_h1": ("mamba", "self_attn"), "qwen3_5_text": ("attention",)}


@pytest.fixture(scope="module", params=MIXERS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_architecture(folder / "model", request.param, MIXED[request.param])
    make_tokens(folder / "tokens.npy")
    return folder, request.param


def test_masks_of_every_mixer_are_rebuilt(folder, tmp_path):
    folder, model_type = folder
    result = run(folder, tmp_path / "out", sparsity=0.5, rebuild="barber", rebuild_threshold=0.5)
    blocks = [(block.layer, block.block) for block in result.sparsity.blocks]
    assert blocks == [(layer, name) for layer in range(2) for name in (*MIXERS[model_type], "mlp")]
    assert all(block.swaps > 0 for block in result.sparsity.blocks)
    before, after = (
        [getattr(block, name) for block in result.sparsity.blocks] for name in ("error_before", "error_after")
    )
    assert 0 < sum(after) < sum(before)  # a step of scan or of a recurrence is far from what gradients say of it
    assert [verdict.faults for verdict in check(str(tmp_path / "out"))] == [[]]


@pytest.mark.parametrize("allocation", ["owl", "mosaic", "mosaic-released", "fisher"])
def test_layers_of_other_kinds_are_allocated_together(folder, tmp_path, allocation):
    result = run(folder[0], tmp_path / "out", method="wanda", sparsity=0.6, allocation=allocation)
    assert len({report.target for report in result.sparsity.projections}) > 1
    if allocation != "mosaic-released":
        assert result.sparsity.achieved == pytest.approx(0.6, abs=5e-3)


def test_a_layer_of_any_kind_is_trained(folder, tmp_path):
    result = run(folder[0], tmp_path / "out", sparsity=0.5, reconstruct=4)
    steps = result.sparsity.improvements
    assert [step.layer for step in steps] == [0, 1]
    assert any(step.kept and step.error_after < step.error_before for step in steps)
    assert result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


def test_the_run_says_what_stays_dense(folder, tmp_path, capsys):
    run(folder[0], tmp_path / "out", reporter=Reporter(), sparsity=0.5, method="magnitude")
    said = " ".join(capsys.readouterr().err.split())
    conv = {"falcon_h1": "mamba", "qwen3_5_text": "linear_attn"}[folder[1]]
    assert f"left dense: {conv}.conv1d (no weights of an nn.Linear)" in said


def test_plans_and_costs_are_the_sum_over_kinds(folder):
    folder, model_type = folder
    values = {"model": str(folder / "model"), "hardware": "cpu", "samples": 12, "seqlen": 24}
    planned = plan(PlanRecipe.checked(values)).plans[0]
    model, costs = read_model(str(folder / "model")), planned.candidate.costs
    assert len(model.kinds(range(2))) == (1 if model_type == "falcon_h1" else 2)
    assert (
        sum(shape.elements for shape in model.shapes) == model.parameters - model.embedding - model.head - model.hidden
    )
    assert model.at(1).inputs == model.shapes[1].inputs
    assert isinstance(costs, Costs)
    through = costs.forward(4, [0, 1]) - costs.forward(4, [])
    assert through == pytest.approx(costs.at(0).layer(4) + costs.at(1).layer(4))
    projections = [sum(one.weights for one in shape.inputs) for shape in model.shapes]
    assert [model.at(index).projections for index in range(2)] == projections
    assert all(shape.matrices > pruned for shape, pruned in zip(model.shapes[:1], projections, strict=False))
    assert planned.fits
