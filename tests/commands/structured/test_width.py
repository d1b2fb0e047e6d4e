"""Runs that remove key/value groups and neurons: what is written, layout, memory, interruptions."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.errors import InputError, SolverError
from shardprune.storage.relative_paths import absolute_paths
from tests.commands.structured.narrowed import (
    COMPOSITE,
    INPUTS,
    OUTPUTS,
    M,
    cut,
    layers_of,
    loaded,
    records,
    share_of,
    written,
)
from tests.solvers.test_structures import plain_columns
from tests.support.entries import entries
from tests.support.running import run
from tests.support.tiny import GROUPED, differing, load_tensors, make_model, make_tokens, snapshot

# -- what is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", GROUPED)
@torch.no_grad()
def test_every_family_computes_what_the_model_without_the_structures_does(family, tmp_path):
    make_model(tmp_path / "model", family, configs=GROUPED)
    make_tokens(tmp_path / "tokens.npy")
    result = run(tmp_path, "o", structured=share_of(family), score="amp", correction=False)
    before, after = result.structure.before, result.structure.after
    assert (before.groups, after.groups) == (4, {"gemma2": 2, "opt": 4, "opt-350m": 4}.get(family, 3))
    kept = records(tmp_path / "o")
    assert all(len(layer["groups"]) == after.groups and len(layer["neurons"]) == after.neurons for layer in kept)

    model, narrow = loaded(tmp_path / "model"), loaded(tmp_path / "o")
    assert narrow.config.model_type == ("mistral" if "llama" in family else model.config.model_type)
    cut(layers_of(model), family, kept, before.groups)
    tokens = torch.from_numpy(np.load(tmp_path / "tokens.npy"))
    assert torch.allclose(narrow(tokens).logits, model(tokens).logits, atol=1e-4)
    assert narrow.generate(tokens[:1, :8], max_new_tokens=4, do_sample=False).shape[1] > 8

    dense = loaded(tmp_path / "model")
    assert (model(tokens).logits - dense(tokens).logits).abs().max() > 0.01
    assert result.model.parameters_before == sum(parameter.numel() for parameter in dense.parameters())
    assert result.model.parameters_after == sum(parameter.numel() for parameter in narrow.parameters())


@pytest.mark.parametrize("family", entries(list(GROUPED), *GROUPED.keys() - {"llama-3.1", "gemma2", "opt"}))
def test_every_family_sharded_equals_single(family, tmp_path, device):
    make_model(tmp_path / "model", family, configs=GROUPED)
    make_tokens(tmp_path / "tokens.npy")
    fields = {"structured": share_of(family), "device": device, "eval": (str(tmp_path / "tokens.npy"),)}
    single = run(tmp_path, "single", **fields)
    sharded = run(tmp_path, "sharded", shards=3, weights="streamed", **fields)
    assert differing(tmp_path / "single", tmp_path / "sharded") == []
    assert single.perplexity == sharded.perplexity
    assert single.structure == sharded.structure
    assert loaded(tmp_path / "sharded")


def test_perplexity_is_that_of_the_whole_model(folder, tmp_path):
    source = str(folder / "other.npy")
    measured = run(folder, tmp_path / "o", structured=0.3, shards=2, eval=(source,)).perplexity[source]
    tokens = torch.from_numpy(np.load(source))
    for model, found in ((folder / "model", measured.before), (tmp_path / "o", measured.after)):
        with torch.no_grad():
            logits = loaded(model)(tokens).logits[:, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert found == pytest.approx(float(losses.exp()), rel=1e-5)
    assert measured.before != measured.after


@pytest.mark.parametrize("share", [0.06, 0.25, 0.41, 0.6])
def test_the_request_is_met_to_a_neuron_per_layer(folder, share, tmp_path):
    result = run(folder, tmp_path / "o", structured=share)
    before, after = load_tensors(folder / "model"), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    projections = [name for name in before if "proj" in name]
    had, has = (sum(tensors[name].numel() for name in projections) for tensors in (before, after))
    assert abs(had - has - share * had) <= 4 * 3 * 32 / 2  # half a neuron of each of the four layers
    assert result.sparsity.target == share
    assert result.sparsity.removed == result.sparsity.achieved == pytest.approx(1 - has / had, abs=1e-12)
    assert (result.sparsity.zeroed, result.sparsity.before) == (0, 0)


def test_result_json_holds_the_contract(folder, tmp_path):
    result = run(folder, tmp_path / "o", structured=0.3, shards=2, replicas=2, eval=(str(folder / "other.npy"),))
    stored = json.loads((tmp_path / "o" / "result.json").read_text())
    assert absolute_paths(stored, str(tmp_path / "o")) == result.as_json()
    assert stored["command"] == "prune"
    recipe = stored["recipe"]
    assert (recipe["structured"], recipe["score"], recipe["correction"]) == (0.3, "obs", True)
    structure = stored["structure"]
    assert structure["before"] == {"layers": 4, "groups": 4, "heads": 8, "neurons": 48}
    assert structure["after"] == {"layers": 4, "groups": 3, "heads": 6, "neurons": 32}
    for layer, record in zip(structure["layers"], records(tmp_path / "o"), strict=True):
        assert (layer["layer"], layer["groups"]) == (record["layer"], record["groups"])
        assert all(0 < error < 1 for error in layer["errors"].values())
        assert set(layer["errors"]) == set(OUTPUTS["others"])
    assert {"plan", "load", "prune", "write", "evaluate", "total"} <= stored["seconds"].keys()
    assert [(worker["shard"], worker["replica"]) for worker in stored["workers"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not (tmp_path / "o" / "run.json").exists()
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == stored["model"]["parameters_after"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_stays_and_only_what_shrinks_changes(folder, dtype, tmp_path):
    make_model(tmp_path / "half", "qwen2", dtype, GROUPED)
    run(folder, tmp_path / "o", model=tmp_path / "half", structured=0.3, shards=2)
    before, after = load_tensors(tmp_path / "half"), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    kept = records(tmp_path / "o")
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if not any(f"{projection}." in name for projection in (*INPUTS, "o_proj", "down_proj")):
            assert torch.equal(tensor, before[name]), name
        elif any(f"{projection}." in name for projection in INPUTS):  # weights and biases lose rows
            layer = kept[int(name.split(".")[2])]
            unit, size = ("neurons", 1) if "mlp" in name else ("groups", 8 if "q_proj" in name else 4)
            assert torch.equal(tensor, before[name][plain_columns(layer[unit], size)]), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype="auto").dtype == dtype


def test_what_a_config_leaves_to_defaults_stays_as_it_was(folder, tmp_path):
    """Saved as a Mistral, whose defaults are others, a Llama keeps its own."""
    shutil.copytree(folder / "model", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["max_position_embeddings"]
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    run(folder, tmp_path / "o", model=tmp_path / "bare", structured=0.3)
    before, after = AutoConfig.from_pretrained(tmp_path / "bare"), AutoConfig.from_pretrained(tmp_path / "o")
    assert (before.model_type, after.model_type) == ("llama", "mistral")
    assert after.max_position_embeddings == before.max_position_embeddings


# -- layout, memory, interruptions ----------------------------------------------------------------------------

LAYOUTS = [
    {"shards": 3},
    {"weights": "streamed"},
    {"weights": "streamed", "shards": 3},
    {"activations": "device"},
    {"measure_error": False},
]
SCORES = [
    {"structured": 0.3},
    {"structured": 0.3, "score": "outlier", "outlier_m": M, "correction": False},
]


@pytest.mark.parametrize("same", SCORES, ids=str)
@pytest.mark.parametrize("fields", entries(LAYOUTS, str({"shards": 3}), str({"weights": "streamed"})))
def test_layout_and_memory_do_not_change_a_bit(folder, undisturbed, fields, same, tmp_path):
    out, plain = undisturbed(**same)
    other = run(folder, tmp_path / "other", **same, **fields)
    assert differing(out, tmp_path / "other") == []
    assert [layer.groups for layer in other.structure.layers] == [layer.groups for layer in plain.structure.layers]
    if "measure_error" not in fields:
        assert other.structure == plain.structure


@pytest.mark.parametrize("score", entries(["amp", "outlier", "obs"], "amp"))
@pytest.mark.parametrize("fields", [{"replicas": 2}, {"replicas": 3, "shards": 2, "weights": "streamed"}], ids=str)
def test_replicas_change_only_the_order_of_sums(folder, undisturbed, score, fields, tmp_path):
    out, one = undisturbed(structured=0.3, score=score)
    several = run(folder, tmp_path / "several", structured=0.3, score=score, **fields)
    assert several.structure.after == one.structure.after
    assert [layer.groups for layer in several.structure.layers] == [layer.groups for layer in one.structure.layers]
    first, second = load_tensors(out), load_tensors(tmp_path / "several")
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("same", SCORES, ids=str)
def test_parallel_is_exact_inside_a_segment(folder, undisturbed, same, tmp_path):
    exact, _ = undisturbed(**same)
    run(folder, tmp_path / "one", propagation="parallel", shards=1, **same)
    assert differing(exact, tmp_path / "one") == []
    run(folder, tmp_path / "two", propagation="parallel", shards=2, **same)
    run(folder, tmp_path / "streamed", propagation="parallel", shards=2, weights="streamed", **same)
    run(folder, tmp_path / "fewer", propagation="parallel", shards=1, segments=2, **same)
    assert differing(tmp_path / "two", tmp_path / "streamed") == []
    assert differing(tmp_path / "two", tmp_path / "fewer") == []
    changed = {name.split(".")[2] for name in differing(exact, tmp_path / "two")}
    # the first segment sees no boundary, and without correction all see the dense model
    assert changed == ({"2", "3"} if same.get("correction", True) else set())


@pytest.mark.parametrize(
    "fields",
    [{}, {"correction": False}, {"weights": "streamed", "shards": 2}, {"propagation": "parallel", "shards": 2}],
    ids=str,
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(folder, fields, dies_at_layer, tmp_path):
    fields = {"structured": 0.3, "eval": (str(folder / "other.npy"),), **fields}
    undisturbed = run(folder, tmp_path / "plain", **fields)
    dies_at_layer(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    finished = written(tmp_path / "cut")
    assert len(finished) == 3
    resumed = run(folder, tmp_path / "cut", **fields)
    assert differing(tmp_path / "plain", tmp_path / "cut") == []
    assert finished.items() <= written(tmp_path / "cut").items()
    assert resumed.perplexity == undisturbed.perplexity
    assert (resumed.structure, resumed.sparsity) == (undisturbed.structure, undisturbed.sparsity)


@pytest.mark.parametrize(
    "changed",
    [
        {"structured": 0.31},
        {"score": "amp", "outlier_m": 5.0},
        {"correction": False},
        {"outlier_m": 4.0},
        {"sparsity": 0.6},
    ],
    ids=str,
)
def test_another_runs_output_is_never_touched(folder, changed, tmp_path):
    fields = {"structured": 0.3, "score": "outlier", "outlier_m": M}
    run(folder, tmp_path / "o", **fields)
    before = snapshot(tmp_path / "o")
    with pytest.raises(InputError, match="out: .* holds another run; choose an empty directory"):
        run(folder, tmp_path / "o", **{**fields, **changed})
    assert snapshot(tmp_path / "o") == before


def test_a_layer_that_cannot_be_narrowed_names_the_projection(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_tensors(tmp_path / "model")
    tensors["model.layers.2.post_attention_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SolverError, match=r"layer 2 mlp\.down_proj: its inputs are not finite"):
        run(folder, tmp_path / "o", model=tmp_path / "model", structured=0.3)
    assert len(written(tmp_path / "o")) == 2  # the layers before it are kept


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"structured": 0.9}, r"structured: 0\.9 is more than the model can give: 6,912 parameters of a layer"),
        ({"structured": 0.9, "sparsity": 0.95}, r"structured: 0\.9 is more than the model can give"),
        ({"structured": 0.3, "shards": 5}, "shards: 5 is more than the model's 4 layers"),
        ({"structured": 0.3, "sparsity": 0.5, "samples": 13}, "samples: 13 is more than the 12 rows"),
        ({"structured": 0.3, "sparsity": 0.5, "eval": "/no/such.txt"}, "eval: '/no/such.txt' does not exist"),
    ],
)
def test_bad_input_leaves_no_output(folder, fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "o", **fields)
    assert not (tmp_path / "o").exists()


def test_a_directory_of_other_things_is_never_touched(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(InputError, match="out: .* is not empty and holds no run"):
        run(folder, tmp_path, **COMPOSITE)
    assert snapshot(tmp_path) == {"thesis.txt": b"chapter one"}
