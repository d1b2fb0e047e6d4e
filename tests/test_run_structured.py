"""Runs that remove key/value groups and neurons, alone and before weights become zero."""

import io
import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration

from shardprune.errors import InputError, SolverError
from shardprune.progress import Output
from shardprune.shard.worker import ShardWorker
from shardprune.solvers.pattern import parse_pattern
from tests.running import run
from tests.solvers.test_structures import damped, plain_columns, plain_greedy, plain_hessian
from tests.tiny import (
    GROUPED,
    LLAVA_LAYOUTS,
    VOCABULARY,
    differing,
    load_tensors,
    make_llava,
    make_model,
    make_tokens,
    snapshot,
)

M = 1.5
OUTPUTS = {  # whose columns are structures, by family: of the attention, of the MLP
    "opt": ("self_attn.out_proj", "fc2"),
    "others": ("self_attn.o_proj", "mlp.down_proj"),
}
INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "fc1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structured")
    make_model(folder / "model", "llama-3.1", configs=GROUPED)
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """Outputs and results of runs on one worker that several tests compare with, each done once."""
    done = {}

    def once(**fields):
        if str(fields) not in done:
            out = tmp_path_factory.mktemp("undisturbed")
            done[str(fields)] = out, run(folder, out, **fields)
        return done[str(fields)]

    return once


def share_of(family: str) -> float:
    """A share for which groups go: of Gemma 2, whose heads divide the hidden size, two or none."""
    return 0.5 if family == "gemma2" else 0.3


def outputs_of(family: str) -> tuple[str, str]:
    return OUTPUTS.get(family.split("-")[0], OUTPUTS["others"])


def layers_of(model) -> torch.nn.ModuleList:
    return (model.model.decoder if hasattr(model.model, "decoder") else model.model).layers


def records(out) -> list[dict]:
    """What the headers of the layer files say was done."""
    found = []
    for file in sorted(Path(out).glob("model-*"))[1:]:
        with safe_open(file, "pt") as opened:
            found.append(json.loads(opened.metadata()["shardprune"]))
    return found


def cut(layers, family: str, kept: list[dict], groups: int) -> None:
    """Make the output projections' columns of all structures but those kept zero."""
    for layer, record in zip(layers, kept, strict=True):
        for name, unit in zip(outputs_of(family), ("groups", "neurons"), strict=True):
            weight = layer.get_parameter(f"{name}.weight").data
            size = weight.shape[1] // groups if unit == "groups" else 1
            gone = sorted(set(range(weight.shape[1])) - set(plain_columns(record[unit], size)))
            weight[:, gone] = 0


def loaded(out):
    """A checkpoint that has all tensors of its config and no others, as transformers loads it."""
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


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


@pytest.mark.parametrize("family", GROUPED)
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
    assert stored == result.as_json()
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


# -- which structures stay, and what the rest becomes ---------------------------------------------------------


def gather(model, layer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each linear module of a layer reads, [windows, tokens, cols] in float64."""
    linears = {name: part for name, part in layer.named_modules() if isinstance(part, torch.nn.Linear)}
    read: dict[str, torch.Tensor] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _module, inputs, name=name: read.update({name: inputs[0].double().view(*tokens.shape, -1)})
        )
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return read


def plain_outliers(layer, read, groups: int, unit: str) -> list[tuple[float, float]]:
    """Of each structure: its share of entries of Wanda's metric above M times the layer's mean, and their mean."""
    metric = {
        name: layer.get_parameter(f"{name}.weight").double().abs() * (x.square().sum((0, 1)) / len(x)).sqrt()
        for name, x in read.items()
    }
    threshold = M * torch.cat([entries.flatten() for entries in metric.values()]).mean()
    owned = []
    for name, entries in metric.items():
        own = ("mlp" in name or "fc" in name) == (unit == "neurons")
        if own and "qkv" in name:
            owned += entries.split([groups * 8, groups * 4, groups * 4])
        elif own and "gate_up" in name:
            owned += entries.chunk(2)
        elif own:
            owned.append(entries.t() if name.endswith(("o_proj", "out_proj", "down_proj", "fc2")) else entries)
    count = groups if unit == "groups" else len(owned[0])
    entries = torch.cat([part.reshape(count, -1) for part in owned], 1)
    return list(zip((entries > threshold).double().mean(1).tolist(), entries.mean(1).tolist(), strict=True))


def plain_choice(layer, read, name: str, unit: str, score: str, groups: int, count: int) -> list[int]:
    """Indices of the structures that stay."""
    weight, x = layer.get_parameter(f"{name}.weight").data.double(), read[name]
    structures = groups if unit == "groups" else weight.shape[1]
    size = weight.shape[1] // structures
    if score == "obs":  # a ReLU leaves neurons that are never active, which cost nothing
        weight = weight * (x != 0).any(0).any(0)
        return plain_greedy(weight, damped(plain_hessian(x), 0.01), size, count)
    if score == "outlier":
        scores = plain_outliers(layer, read, groups, unit)
    elif unit == "neurons":
        scores = x.abs().sum((0, 1)).tolist()
    else:
        width = layer.self_attn.head_dim  # each query head of a group on its own
        heads = [
            (x[..., k : k + width] @ weight[:, k : k + width].T).abs().sum() for k in range(0, len(x[0, 0]), width)
        ]
        scores = torch.stack(heads).view(groups, -1).sum(1).tolist()
    return sorted(sorted(range(structures), key=lambda k: scores[k], reverse=True)[:count])


def corrected(weight: torch.Tensor, x: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The columns that stay where they take on what the others gave: ridge regression in float64."""
    hessian = plain_hessian(x)
    inner = damped(hessian[kept][:, kept], 0.01)
    change = weight.double() @ hessian[:, kept] - weight.double()[:, kept] @ hessian[kept][:, kept]
    return weight.double()[:, kept] + torch.linalg.solve(inner, change.T).T


def relative_error(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - other).double().T).square().sum() / (x @ weight.double().T).square().sum())


@pytest.mark.parametrize(
    ("family", "score", "correction"),
    [
        *((family, score, True) for family in ("llama-3.1", "phi3") for score in ("amp", "outlier", "obs")),
        *(("llama-3.1", score, False) for score in ("amp", "outlier", "obs")),
        ("qwen2", "outlier", True),
        ("opt", "amp", True),
        ("opt", "outlier", False),
        ("opt", "obs", True),
    ],
)
def test_equals_the_loop_over_a_whole_model(family, score, correction, tmp_path):
    make_model(tmp_path / "model", family, configs=GROUPED)
    make_tokens(tmp_path / "tokens.npy")
    fields = {"outlier_m": M} if score == "outlier" else {}
    result = run(tmp_path, "o", structured=0.3, score=score, correction=correction, shards=2, **fields)
    widths, groups = result.structure.after, result.structure.before.groups
    kept, written = records(tmp_path / "o"), load_tensors(tmp_path / "o")

    tokens = torch.from_numpy(np.load(tmp_path / "tokens.npy"))
    model, dense = loaded(tmp_path / "model"), loaded(tmp_path / "model")
    for index, layer in enumerate(layers_of(model)):
        # The layers below are narrow only where they are corrected; without that the dense model's activations judge.
        read = gather(*((model, layer) if correction else (dense, layers_of(dense)[index])), tokens)
        cuts = {}
        for name, unit in zip(outputs_of(family), ("groups", "neurons"), strict=True):
            count = getattr(widths, unit)
            choice = plain_choice(layer, read, name, unit, score, groups, count)
            assert kept[index][unit] == choice, (index, unit)
            weight = layer.get_parameter(f"{name}.weight").data
            columns = plain_columns(choice, weight.shape[1] // groups if unit == "groups" else 1)
            if len(columns) == weight.shape[1]:
                continue
            uncorrected, cuts[name] = torch.zeros_like(weight), torch.zeros_like(weight)
            uncorrected[:, columns] = weight[:, columns]
            cuts[name][:, columns] = (
                corrected(weight, read[name], columns).float() if correction else weight[:, columns]
            )
            found = next(tensor for key, tensor in written.items() if key.endswith(f"layers.{index}.{name}.weight"))
            assert torch.allclose(found, cuts[name][:, columns], rtol=1e-3 * correction, atol=1e-4 * correction)
            error = relative_error(weight, cuts[name], read[name])
            assert result.structure.layers[index].errors[name] == pytest.approx(error, rel=1e-2)
            assert not correction or error < 0.95 * relative_error(weight, uncorrected, read[name])
        for name, weight in cuts.items():
            layer.get_parameter(f"{name}.weight").data.copy_(weight)


@pytest.fixture(scope="module")
def texts(english_model, tmp_path_factory) -> dict[str, str]:
    """The beginnings of two texts that the trained model has not seen."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("calibration-english.txt", "recovery-english.txt"):
        (folder / name).write_text((Path(english_model).parents[1] / "data" / name).read_text()[:100_000])
    return {"calibration": str(folder / "calibration-english.txt"), "eval": str(folder / "recovery-english.txt")}


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_correction_lowers_the_perplexity_of_a_trained_model(english_model, texts, share, tmp_path):
    fields = {**texts, "model": english_model, "samples": 16, "seqlen": 128, "wave": 8, "eval_windows": 20}
    corrected, plain = (
        run(tmp_path, f"{correction}", structured=share, correction=correction, **fields).perplexity[texts["eval"]]
        for correction in (True, False)
    )
    assert corrected.before == plain.before < corrected.after < plain.after


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
@pytest.mark.parametrize("fields", LAYOUTS, ids=str)
def test_layout_and_memory_do_not_change_a_bit(folder, undisturbed, fields, same, tmp_path):
    out, plain = undisturbed(**same)
    other = run(folder, tmp_path / "other", **same, **fields)
    assert differing(out, tmp_path / "other") == []
    assert [layer.groups for layer in other.structure.layers] == [layer.groups for layer in plain.structure.layers]
    if "measure_error" not in fields:
        assert other.structure == plain.structure


@pytest.mark.parametrize("score", ["amp", "outlier", "obs"])
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


def written(out) -> dict[str, int]:
    """When each file with weights was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(out).glob("model-*.safetensors")}


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


# -- composite: what remains becomes sparse -------------------------------------------------------------------

COMPOSITES = [
    {"structured": 0.2, "sparsity": 0.5},
    {"structured": 0.2, "sparsity": 0.5, "method": "wanda", "allocation": "owl", "outlier_m": M},
    {"structured": 0.2, "pattern": "2:4"},
    {"structured": 0.2, "sparsity": 0.5, "rebuild": "barber", "rebuild_threshold": 0.3, "score": "amp"},
]
COMPOSITE = {"structured": 0.3, "sparsity": 0.5}


@pytest.mark.parametrize("fields", COMPOSITES, ids=str)
def test_removed_and_zeroed_make_up_the_target(folder, fields, tmp_path):
    source = str(folder / "other.npy")
    result = run(folder, tmp_path / "o", eval=(source,), **fields)
    narrow = run(folder, tmp_path / "narrow", eval=(source,), structured=0.2, score=fields.get("score", "obs"))
    before, after = load_tensors(folder / "model"), load_tensors(tmp_path / "o")
    projections = [name for name in before if "proj" in name]
    weights, left = (sum(tensors[name].numel() for name in projections) for tensors in (before, after))
    zeros = sum(int((after[name] == 0).sum()) for name in projections)

    sparsity, target = result.sparsity, 0.2 + 0.8 * 0.5 if "pattern" in fields else 0.5
    assert sparsity.removed == narrow.sparsity.removed == pytest.approx(1 - left / weights, abs=1e-12)
    assert sparsity.zeroed == pytest.approx(zeros / weights, abs=1e-12)
    assert sparsity.achieved == pytest.approx((weights - left + zeros) / weights, abs=1e-12)
    assert sparsity.target == pytest.approx(target)
    assert sparsity.achieved == pytest.approx(target, abs=28 / weights if "sparsity" in fields else 0.01)
    assert sparsity.allocated == pytest.approx(sparsity.achieved, abs=28 / weights)
    assert all(parse_pattern(fields.get("pattern", "unstructured")).holds(after[name]) for name in projections)

    assert result.structure == narrow.structure
    assert result.model == narrow.model
    assert result.perplexity[source].before == narrow.perplexity[source].before
    assert result.perplexity[source].after not in (narrow.perplexity[source].after, narrow.perplexity[source].before)
    assert result.recipe["model"] == str(folder / "model")
    assert {name: tensor.shape for name, tensor in after.items()} == {
        name: tensor.shape for name, tensor in load_tensors(tmp_path / "narrow").items()
    }
    assert not any(path.is_dir() for path in (tmp_path / "o").iterdir())
    assert not (tmp_path / "o" / "run.json").exists()
    assert loaded(tmp_path / "o").config.num_key_value_heads == result.structure.after.groups


def test_the_second_run_is_that_of_the_narrowed_model(folder, undisturbed, tmp_path):
    out, _ = undisturbed(**COMPOSITE)
    narrowed, narrow = undisturbed(structured=0.3)
    share = (0.5 - narrow.sparsity.removed) / (1 - narrow.sparsity.removed)
    run(folder, tmp_path / "sparse", model=narrowed, sparsity=share)
    assert differing(out, tmp_path / "sparse") == []


@pytest.mark.parametrize("fields", [{"shards": 3, "weights": "streamed"}, {"shards": 2}], ids=str)
def test_composite_sharded_equals_single(folder, undisturbed, fields, tmp_path):
    out, plain = undisturbed(**COMPOSITE)
    other = run(folder, tmp_path / "other", **COMPOSITE, **fields)
    assert differing(out, tmp_path / "other") == []
    assert (other.sparsity, other.structure) == (plain.sparsity, plain.structure)


def test_composite_over_memory_urls(folder, undisturbed, tmp_path):
    out, _ = undisturbed(**COMPOSITE)
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder / 'model'}/", "/structured/in/", recursive=True)
    run(folder, "memory://structured/out", model="memory://structured/in", **COMPOSITE)
    memory.get("/structured/out/", f"{tmp_path / 'fetched'}/", recursive=True)
    assert differing(out, tmp_path / "fetched") == []
    assert snapshot(out).keys() == snapshot(tmp_path / "fetched").keys()


def test_zeros_that_the_model_had_are_those_before(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_tensors(tmp_path / "model")
    for name in (name for name in tensors if "proj" in name):
        tensors[name][:, ::4] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    narrow = run(folder, tmp_path / "narrow", model=tmp_path / "model", structured=0.3, correction=False)
    composite = run(folder, tmp_path / "o", model=tmp_path / "model", **COMPOSITE, correction=False)
    assert narrow.sparsity.before == composite.sparsity.before == 0.25
    assert narrow.sparsity.achieved == pytest.approx(narrow.sparsity.removed + narrow.sparsity.zeroed)
    assert narrow.sparsity.zeroed > 0


@pytest.mark.parametrize("fields", [{}, {"weights": "streamed", "shards": 2}], ids=str)
def test_composite_cut_off_in_both_runs_goes_on_to_the_same_bits(folder, undisturbed, fields, dies_at_layer, tmp_path):
    measured = {**COMPOSITE, "eval": (str(folder / "other.npy"),)}
    (out, plain), fields = undisturbed(**measured), {**measured, **fields}
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    first = written(tmp_path / "cut" / "structured")
    assert (len(first), written(tmp_path / "cut")) == (2, {})
    dies_at_layer(1)  # which the first run has done, so that it is the second one's
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    narrowed, second = written(tmp_path / "cut" / "structured"), written(tmp_path / "cut")
    assert first.items() <= narrowed.items()
    assert (len(narrowed), len(second)) == (5, 1)
    dies_at_layer(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    assert written(tmp_path / "cut" / "structured") == narrowed
    assert not (tmp_path / "cut" / "result.json").exists()

    resumed = run(folder, tmp_path / "cut", **fields)
    assert differing(out, tmp_path / "cut") == []
    assert second.items() <= written(tmp_path / "cut").items()
    assert not (tmp_path / "cut" / "structured").exists()
    assert resumed.perplexity == plain.perplexity
    assert (resumed.sparsity, resumed.structure) == (plain.sparsity, plain.structure)
    assert resumed.model == plain.model


def test_a_finished_composite_is_not_done_again(folder, tmp_path):
    first = run(folder, tmp_path / "o", **COMPOSITE)
    before, said = snapshot(tmp_path / "o"), io.StringIO()
    again = run(folder, tmp_path / "o", **COMPOSITE, shards=2, output=Output(Console(file=said, width=500)))
    assert again == first
    assert said.getvalue() == f"{tmp_path / 'o'} is finished already\n"
    assert snapshot(tmp_path / "o") == before


def test_a_finished_parallel_composite_is_not_done_again_on_fewer_shards(folder, tmp_path):
    first = run(folder, tmp_path / "o", **COMPOSITE, propagation="parallel", shards=4)
    assert run(folder, tmp_path / "o", **COMPOSITE, propagation="parallel", shards=2) == first


def test_a_finished_composite_can_be_measured_on_more(folder, undisturbed, monkeypatch, tmp_path):
    source = str(folder / "other.npy")
    first = run(folder, tmp_path / "o", **COMPOSITE)
    layers = {name: data for name, data in snapshot(tmp_path / "o").items() if name.startswith("model-")}
    with monkeypatch.context() as patched:
        patched.setattr(ShardWorker, "narrow", None)  # nothing is removed again
        result = run(folder, tmp_path / "o", **COMPOSITE, eval=(source,))
    assert result.perplexity == undisturbed(**COMPOSITE, eval=(source,))[1].perplexity
    assert {name: data for name, data in snapshot(tmp_path / "o").items() if name in layers} == layers
    assert (result.sparsity, result.structure, result.model) == (first.sparsity, first.structure, first.model)
    assert not (tmp_path / "o" / "structured").exists()


def test_a_composite_measured_on_another_text_is_not_taken_for_this_one(folder, tmp_path):
    source = tmp_path / "eval.npy"
    make_tokens(source, samples=5, seed=2)
    run(folder, tmp_path / "o", **COMPOSITE, eval=(str(source),))
    make_tokens(source, samples=5, seed=3)
    second = run(folder, tmp_path / "o", **COMPOSITE, eval=(str(source),)).perplexity
    assert second == run(folder, tmp_path / "fresh", **COMPOSITE, eval=(str(source),)).perplexity


@pytest.mark.parametrize("state", ["finished", "first run", "second run"])
def test_another_composites_output_is_never_touched(folder, state, dies_at_layer, tmp_path):
    for layer in {"finished": (), "first run": (2,), "second run": (2, 1)}[state]:
        dies_at_layer(layer)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "o", **COMPOSITE)
    if state == "finished":
        run(folder, tmp_path / "o", **COMPOSITE)
    before = snapshot(tmp_path / "o")
    for changed in ({"sparsity": 0.6}, {"structured": 0.2}, {"score": "amp"}, {"sparsity": None}, {"structured": None}):
        with pytest.raises(InputError, match="out: .* holds another run; choose an empty directory"):
            run(folder, tmp_path / "o", **{**COMPOSITE, **changed})
        assert snapshot(tmp_path / "o") == before


def test_no_resume_starts_a_composite_and_refuses_what_is_there(folder, tmp_path):
    run(folder, tmp_path / "o", **COMPOSITE, resume=False)
    before = snapshot(tmp_path / "o")
    with pytest.raises(InputError, match="out: .* holds this run already"):
        run(folder, tmp_path / "o", **COMPOSITE, resume=False)
    assert snapshot(tmp_path / "o") == before


@pytest.mark.parametrize("allocation", ["uniform", "owl", "mosaic"])
@pytest.mark.parametrize("share", [0.2, 0.22])
def test_a_sparsity_that_removal_alone_has_met_leaves_nothing_to_zero(folder, share, allocation, tmp_path):
    """Widths are whole neurons: what is removed may be a little more than was asked for."""
    result = run(folder, tmp_path / "o", structured=share, sparsity=share, allocation=allocation)
    assert result.sparsity.achieved == pytest.approx(share, abs=0.01)
    assert result.sparsity.zeroed <= max(0, share - result.sparsity.removed) + 28 / 30720


# -- models with a language tower -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{"sparsity": 0.5}, {"structured": 0.3, "score": "amp", "correction": False}, COMPOSITE], ids=str
)
@pytest.mark.parametrize("prefix", LLAVA_LAYOUTS)
@torch.no_grad()
def test_only_the_language_tower_of_a_llava_is_pruned(folder, prefix, fields, tmp_path):
    make_llava(tmp_path / "llava", **LLAVA_LAYOUTS[prefix])
    result = run(folder, tmp_path / "o", model=tmp_path / "llava", shards=2, **fields)
    before, after = load_tensors(tmp_path / "llava"), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (name.startswith(f"{prefix}layers.") and "proj" in name), name
    config, old = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "o", tmp_path / "llava"))
    assert {**config, "text_config": None} == {**old, "text_config": None}
    assert config["text_config"]["model_type"] == ("mistral" if "structured" in fields else "llama")

    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.tensor([[2, *[VOCABULARY - 1] * 4, 5, 9, 11]])
    image = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert model.generate(ids[:, -3:], max_new_tokens=4, do_sample=False).shape[1] > 3
    found = model.eval()(input_ids=ids, **image).logits
    assert torch.isfinite(found).all()
    if "correction" in fields:
        whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
        cut(whole.model.language_model.layers, "llama", records(tmp_path / "o"), result.structure.before.groups)
        assert torch.allclose(found, whole(input_ids=ids, **image).logits, atol=1e-4)


def test_the_layouts_of_a_llava_give_the_same_tensors(folder, tmp_path):
    found = []
    for number, (prefix, saving) in enumerate(LLAVA_LAYOUTS.items()):
        make_llava(tmp_path / f"llava{number}", **saving)
        run(folder, tmp_path / f"o{number}", model=tmp_path / f"llava{number}", **COMPOSITE)
        model = LlavaForConditionalGeneration.from_pretrained(tmp_path / f"o{number}")
        found.append(model.state_dict())
        assert any(name.startswith(f"{prefix}layers.0.") for name in load_tensors(tmp_path / f"o{number}"))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


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
