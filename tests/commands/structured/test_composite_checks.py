"""Composites: what the second run reads is checked before the first begins, and ignored projections do not count."""

import pytest
import torch
from safetensors.torch import load_file

from shardprune import MopRecipe, Recipe
from shardprune.commands.prepare_mop import path_plan_of
from shardprune.errors import InputError
from shardprune.model.opening import open_model
from shardprune.planning.plan import plan
from shardprune.planning.recipe import PlanRecipe
from tests.support.running import run
from tests.support.tiny import GROUPED, make_model, make_tokens


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped")
    make_model(folder / "model", "llama-3.1", configs=GROUPED)
    make_tokens(folder / "tokens.npy")
    return folder


BOTH = {"structured": 0.3, "sparsity": 0.5, "method": "magnitude"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignore": ("lm_haed",)}, "ignore: 'lm_haed' matches no projection"),
        ({"expert_tokens": "all", "method": "wanda"}, "expert_tokens: 'all' has no effect"),
        ({"reconstruct": 1, "replicas": 9}, "replicas: 9 is more than the 8 of 12 samples that are not held out"),
    ],
)
def test_the_second_run_is_checked_before_the_first_begins(grouped, fields, message, tmp_path):
    with pytest.raises(InputError, match=f"^{message}"):
        run(grouped, tmp_path / "o", **{**BOTH, **fields})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ignore": ("*.down_proj",)}, "ignore: .* has no effect without a sparsity"),
        ({"expert_chunks": 2}, "expert_chunks"),
    ],
)
def test_what_goes_with_zeros_alone_is_refused_without_them(fields, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Recipe.checked({"model": "m", "out": "o", "calibration": "c4", "structured": 0.3, **fields})


@pytest.mark.parametrize("ignored", ["down_proj", "gate_proj", "o_proj"])
def test_the_sparsity_is_that_of_the_projections_that_are_not_ignored(grouped, ignored, tmp_path):
    result = run(grouped, tmp_path / "o", ignore=(f"*.{ignored}",), **BOTH)

    def counted(file):
        tensors = {name: tensor for name, tensor in load_file(file).items() if name.endswith("_proj.weight")}
        return [tensor for name, tensor in tensors.items() if ignored not in name]

    files = sorted((tmp_path / "o").glob("*.safetensors"))
    after = [tensor for file in files for tensor in counted(file)]
    before = sum(tensor.numel() for tensor in counted(grouped / "model" / "model.safetensors"))
    zeros = sum(int(torch.count_nonzero(tensor == 0)) for tensor in after)
    removed = before - sum(tensor.numel() for tensor in after)
    assert (removed + zeros) / before == pytest.approx(0.5, abs=1e-3)
    assert result.sparsity.achieved == pytest.approx((removed + zeros) / before, abs=1e-9)
    assert result.sparsity.removed == pytest.approx(removed / before, abs=1e-9)


@pytest.mark.parametrize("ignored", ["*.down_proj", "*.o_proj", "*.mlp.*"])
def test_a_composite_with_ignored_projections_is_planned(grouped, ignored):
    fields = {**BOTH, "samples": 12, "seqlen": 24, "wave": 4, "ignore": (ignored,), "hardware": "cpu"}
    planned = plan(PlanRecipe.checked({**fields, "model": str(grouped / "model")}))
    assert planned.fits
    first, second = planned.plans[0].candidate.tasks
    assert first.model.narrower.parameters == second.model.parameters
    assert second.model.projections < first.model.narrower.projections


def test_a_search_that_would_remove_nothing_is_refused(grouped):
    skeleton = open_model(str(grouped / "model")).skeleton
    values = {"model": "m", "out": "o", "calibration": "c4", "neuron_multiple": 16}
    with pytest.raises(
        InputError, match=r"^remove: 0\.001 removes nothing: the least that goes is 16 neurons of every layer"
    ):
        path_plan_of(MopRecipe.checked({**values, "remove": 0.001}), skeleton).check()
    path_plan_of(MopRecipe.checked({**values, "remove": 0.02, "neuron_multiple": 1}), skeleton).check()


def test_an_iteration_larger_than_a_layer_s_mlp_is_a_path_or_a_line(tmp_path):
    kind, values = GROUPED["llama-3.1"]
    shape = {**values, "num_hidden_layers": 2, "intermediate_size": 24}
    make_model(tmp_path / "model", "llama-3.1", configs={"llama-3.1": (kind, shape)})
    skeleton = open_model(str(tmp_path / "model")).skeleton
    values = {"model": "m", "out": "o", "calibration": "c4", "mlp_only": True}
    path_plan_of(MopRecipe.checked({**values, "remove": 0.2}), skeleton).check()
    with pytest.raises(InputError, match="^path: "):
        path_plan_of(MopRecipe.checked({**values, "path": "GGG"}), skeleton).check()
