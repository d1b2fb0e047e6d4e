"""Runs on FP8 checkpoints: what they write is what they write of the products of weights and scales."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shardprune import (
    EvaluateRecipe,
    ExpertsRecipe,
    ExportRecipe,
    MopRecipe,
    Recipe,
    evaluate,
    experts,
    export,
    load_exported,
    mop,
    prune,
)
from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.fp8 import make_fp8
from tests.support.tiny import differing, load_tensors, make_model, make_tokens

QUIET = Reporter(quiet=True)


def fields(folder, model, out, **changed):
    return {
        **{"model": model, "out": str(folder / out), "calibration": str(folder / "tokens.npy")},
        **{"samples": 12, "seqlen": 24, "wave": 4, "backend": "local", "threads": 1, "report": False},
        **changed,
    }


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {"method": "sparsegpt", "pattern": "2:4", "weights": "streamed"}),
        ("deepseek_v3", {"method": "wanda", "sparsity": 0.5}),
        ("qwen3_moe", {"method": "sparsegpt", "sparsity": 0.5, "expert_chunks": 2}),
    ],
)
def test_pruning_is_that_of_the_products(tmp_path, model_type, changed):
    if model_type == "llama":
        make_model(tmp_path / "model", model_type)
    else:
        make_architecture(tmp_path / "model", model_type, MIXTURES[model_type])
    tokens = make_tokens(tmp_path / "tokens.npy")
    fp8, plain = make_fp8(tmp_path / "model", block=(12, 20))
    for model, out in ((fp8, "one"), (plain, "other")):
        recipe = fields(tmp_path, model, out, eval=[tokens], **changed)
        result = prune(Recipe.checked(recipe), QUIET)
        assert set(result.perplexity) == {tokens}
    assert differing(tmp_path / "one", tmp_path / "other") == []
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("one", "other")]
    assert configs[0] == configs[1]
    assert {str(tensor.dtype) for tensor in load_tensors(tmp_path / "one").values() if tensor.ndim > 1} == {
        "torch.bfloat16"
    }
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(found.values()), found


@pytest.mark.parametrize(
    ("model_type", "changed"), [("qwen3_moe", {}), ("deepseek_v3", {"weights": "streamed", "router_kd": 2})]
)
def test_experts_stay_fp8(tmp_path, model_type, changed):
    values = MIXTURES[model_type] | ({"n_routed_experts": 8} if model_type == "deepseek_v3" else {})
    make_architecture(tmp_path / "model", model_type, values)
    tokens = make_tokens(tmp_path / "tokens.npy")
    fp8, plain = make_fp8(tmp_path / "model", block=(12, 20))
    asked = {"keep": 4, "score": "reap", "eval": [tokens], **changed}
    results = [
        experts(ExpertsRecipe.checked(fields(tmp_path, model, out, **asked)), QUIET)
        for model, out in ((fp8, "one"), (plain, "other"))
    ]
    assert results[0].experts == results[1].experts
    assert results[0].perplexity == results[1].perplexity
    written, before = load_tensors(tmp_path / "one"), load_tensors(fp8)
    for layer in results[0].experts.layers:
        prefix = f"model.layers.{layer.layer}.mlp.experts"
        for place, expert in enumerate(layer.kept):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                for part in ("weight", "weight_scale_inv"):
                    one, other = written[f"{prefix}.{place}.{leaf}.{part}"], before[f"{prefix}.{expert}.{leaf}.{part}"]
                    assert one.dtype == other.dtype
                    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    small = Checkpoint(str(tmp_path / "one"))
    for name, tensor in load_tensors(tmp_path / "other").items():
        assert torch.equal(small.read(name), tensor), name
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["quantization_config"] == json.loads((Path(fp8) / "config.json").read_text())["quantization_config"]
    assert [verdict.faults for verdict in check(str(tmp_path / "one"))] == [[]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with the FP8 form of a Llama, the products, and a text."""
    folder = tmp_path_factory.mktemp("dense")
    make_model(folder / "model", "llama-grouped-tied")
    make_tokens(folder / "tokens.npy")
    make_fp8(folder / "model", block=(12, 20))
    return folder


def same(folder, out, command, recipe_class, **changed):
    """Run a command on both models; return the results after a look at what was written."""
    results = [
        command(recipe_class.checked(fields(folder, str(folder / model), f"{out}-{model}", **changed)), QUIET)
        for model in ("model-fp8", "model-plain")
    ]
    assert differing(folder / f"{out}-model-fp8", folder / f"{out}-model-plain") == []
    return results


def test_what_makes_a_model_smaller_sees_the_products(dense):
    same(dense, "mop", mop, MopRecipe, remove=0.25, path="LG")
    same(dense, "structured", prune, Recipe, method="wanda", sparsity=0.5, structured=0.2)


def test_float32_keeps_the_products(dense):
    recipe = fields(dense, str(dense / "model-fp8"), "wide", method="magnitude", sparsity=0.0, dtype="float32")
    prune(Recipe.checked(recipe), QUIET)
    name = "model.layers.1.mlp.up_proj.weight"
    wide, narrow = load_tensors(dense / "wide")[name], load_tensors(dense / "model-plain")[name]
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, narrow.float())
    assert torch.equal(wide.bfloat16(), narrow)
    assert json.loads((dense / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_object_storage_and_perplexity(dense):
    target = Folder("memory://fp8", "model")
    for file in (dense / "model-fp8").iterdir():
        target.write_bytes(file.name, file.read_bytes())
    asked = {"perplexity": [str(dense / "tokens.npy")], "seqlen": 24, "backend": "local", "threads": 1}
    values = [
        evaluate(EvaluateRecipe.checked({"model": model, **asked}), QUIET).evaluation.perplexity
        for model in ("memory://fp8", str(dense / "model-plain"))
    ]
    assert values[0] == values[1]


def test_an_export_is_the_stored_model_and_loads_as_the_products(dense):
    fp8, packed = str(dense / "model-fp8"), str(dense / "packed")
    export(ExportRecipe.checked({"model": fp8, "to": packed}), QUIET)
    export(ExportRecipe.checked({"model": packed, "to": str(dense / "back"), "restore": True}), QUIET)
    assert (dense / "back" / "model.safetensors").read_bytes() == (dense / "model-fp8/model.safetensors").read_bytes()
    state, expected = load_exported(packed).state_dict(), load_tensors(dense / "model-plain")
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in expected.items())


@pytest.mark.parametrize("format", ["torchao", "openvino"])
def test_formats_of_engines_are_not_made_of_fp8_weights(dense, format):
    recipe = ExportRecipe.checked({"model": str(dense / "model-fp8"), "to": str(dense / "of-engine"), "format": format})
    with pytest.raises(InputError, match=rf"^format: '{format}' is not made of FP8 weights"):
        export(recipe, QUIET)
    assert not (dense / "of-engine").exists()


def test_lm_evals_own_model_is_refused_on_a_gpu(dense):
    from shardprune.evaluation.whole import whole_model

    model = SimpleNamespace(checkpoint=Checkpoint(str(dense / "model-fp8")), settings=SimpleNamespace(device="cuda"))
    with pytest.raises(InputError, match="^engine: 'hf' does not multiply FP8 weights with their scales on a GPU"):
        whole_model(model)


@pytest.mark.parametrize(("field", "value"), [("reconstruct", 2), ("merge", True)])
def test_experts_in_fp8_are_not_trained(tmp_path, field, value):
    make_architecture(tmp_path / "model", "qwen3_moe", MIXTURES["qwen3_moe"])
    make_tokens(tmp_path / "tokens.npy")
    fp8, _ = make_fp8(tmp_path / "model")
    with pytest.raises(InputError, match=rf"^{field}: {value} changes the weights of experts, and these are FP8"):
        experts(ExpertsRecipe.checked(fields(tmp_path, fp8, "out", keep=4, **{field: value})), QUIET)
    assert not (tmp_path / "out").exists()


def test_layers_for_further_tokens_keep_their_scales(tmp_path):
    make_architecture(tmp_path / "model", "qwen3_moe", MIXTURES["qwen3_moe"])
    tensors = load_tensors(tmp_path / "model")
    last = [name for name in tensors if "layers.1." in name]
    further = {name.replace("layers.1.", "layers.2."): tensors[name].clone() for name in last}
    save_file(tensors | further, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    make_tokens(tmp_path / "tokens.npy")
    fp8, plain = make_fp8(tmp_path / "model")
    experts(ExpertsRecipe.checked(fields(tmp_path, fp8, "out", keep=4)), QUIET)
    written, before = load_tensors(tmp_path / "out"), load_tensors(fp8)
    last = {name: tensor for name, tensor in written.items() if "layers.1." in name}
    for name, tensor in last.items():
        assert torch.equal(tensor.view(torch.uint8), written[name.replace("layers.1.", "layers.2.")].view(torch.uint8))
    assert sum("scale_inv" in name for name in last) == sum("scale_inv" in n for n in before if "layers.1." in n) - 6
    recipe = fields(tmp_path, fp8, "pruned", method="magnitude", sparsity=0.5)
    prune(Recipe.checked(recipe), QUIET)
    pruned = load_tensors(tmp_path / "pruned")
    assert pruned.keys() == load_tensors(plain).keys()
    for name in further:
        assert torch.equal(pruned[name], load_tensors(plain)[name])
