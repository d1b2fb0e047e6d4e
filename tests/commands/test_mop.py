"""MoP in one process: candidates, scores, paths and what is kept, against plain formulations over whole models."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from shardprune.errors import InputError
from tests.support.entries import entries
from tests.support.running import search_run as search
from tests.support.tiny import (
    GROUPED,
    LLAVA_LAYOUTS,
    differing,
    load_tensors,
    make_llava,
    make_model,
    make_tokens,
    snapshot,
)


def steps(result) -> str:
    return "".join(entry.step for entry in result.structure.path)


def whole(folder, model="model"):
    return AutoModelForCausalLM.from_pretrained(folder / model, attn_implementation="sdpa", dtype=torch.float32).eval()


def without(model, layers):
    """The plain model without some of its layers; each that stays keeps its own mask."""
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in layers]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def tokens_of(folder) -> torch.Tensor:
    return torch.from_numpy(np.load(folder / "tokens.npy"))


@torch.no_grad()
def plain_score(criterion: str, model, original, tokens) -> float:
    now, then = (of(tokens, use_cache=False).logits.double() for of in (model, original))
    if criterion == "perplexity":
        losses = torch.nn.functional.cross_entropy(now[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return math.exp(losses)
    if criterion == "cosine":
        return float(((now * then).sum(-1) / now.norm(dim=-1) / then.norm(dim=-1)).mean())
    probabilities = then.softmax(-1)
    return float((probabilities * (then.log_softmax(-1) - now.log_softmax(-1))).sum(-1).mean())


@torch.no_grad()
def plain_narrowed(model, groups: int, neurons: int, tokens):
    """AMP over a whole Llama: structures chosen by the unpruned activations, nothing corrected."""
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    dim = model.config.head_dim
    importance = []
    for layer in model.model.layers:
        found = {}
        importance.append(found)

        def attention(module, inputs, found=found):
            parts = inputs[0].unflatten(-1, (-1, dim)) @ torch.eye(dim)
            weights = module.weight.unflatten(1, (-1, dim))
            contributions = torch.einsum("bthd,rhd->bthr", parts, weights)
            found["groups"] = contributions.abs().sum((0, 1, 3)).view(-1, heads).sum(1)

        def mlp(_module, inputs, found=found):
            found["neurons"] = inputs[0].abs().sum((0, 1))

        layer.self_attn.o_proj.register_forward_pre_hook(attention)
        layer.mlp.down_proj.register_forward_pre_hook(mlp)
    model(tokens, use_cache=False)
    tensors = {}
    for index, (layer, found) in enumerate(zip(model.model.layers, importance, strict=True)):
        group = found["groups"].argsort(descending=True)[:groups].sort().values
        neuron = found["neurons"].argsort(descending=True)[:neurons].sort().values
        key = (group[:, None] * dim + torch.arange(dim)).flatten()
        query = (group[:, None] * heads * dim + torch.arange(heads * dim)).flatten()
        prefix = f"model.layers.{index}."
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            tensors[f"{prefix}self_attn.{name}.weight"] = getattr(layer.self_attn, name).weight[rows]
        tensors[f"{prefix}self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight[:, query]
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}mlp.{name}.weight"] = getattr(layer.mlp, name).weight[neuron]
        tensors[f"{prefix}mlp.down_proj.weight"] = layer.mlp.down_proj.weight[:, neuron]
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    make_model(folder / "model", "llama")
    make_tokens(folder / "tokens.npy")
    make_tokens(folder / "other.npy", samples=7, seed=1)
    return folder


def test_a_path_equals_the_plain_steps(folder, tmp_path):
    result = search(folder, tmp_path / "o", path="LG", correction=False)
    first, second = result.structure.path
    assert (first.step, first.layer, first.shape.layers) == ("L", 1, 3)  # the third of four from the end
    assert second.shape.groups == 3
    plain = plain_narrowed(without(whole(folder), {1}), second.shape.groups, second.shape.neurons, tokens_of(folder))
    found = load_tensors(tmp_path / "o")
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("criterion", ["cosine", "kl", "perplexity"])
def test_scores_are_those_of_the_plain_models_and_the_better_one_is_taken(folder, criterion, tmp_path):
    result = search(folder, tmp_path / "o", remove=0.4, criterion=criterion, keep="1")
    first = result.structure.path[0]
    tokens, original = tokens_of(folder), whole(folder)
    shallower = plain_score(criterion, without(whole(folder), {1}), original, tokens)
    assert first.scores["L"] == pytest.approx(shallower, rel=1e-4)
    search(folder, tmp_path / "narrower", path="G")
    narrower = plain_score(criterion, whole(tmp_path, "narrower"), original, tokens)
    assert first.scores["G"] == pytest.approx(narrower, rel=1e-4)
    best = max if criterion == "cosine" else min
    assert first.step == best(("L", "G"), key=first.scores.__getitem__)
    kept = plain_score(criterion, whole(tmp_path, "o/iteration-01"), original, tokens)
    assert kept == pytest.approx(first.scores[first.step], rel=1e-4)


@pytest.mark.parametrize("rule", ["cosine", "perplexity"])
def test_the_layer_that_goes_equals_the_plain_rule(folder, rule, tmp_path):
    result = search(folder, tmp_path / "o", path="LL", depth_rule=rule, shards=2)
    tokens, gone = tokens_of(folder), set()
    for entry in result.structure.path:
        left = [index for index in range(4) if index not in gone]
        if rule == "cosine":
            with torch.no_grad():
                states = []
                for layer in (model := without(whole(folder), gone)).model.layers:
                    layer.register_forward_hook(lambda _m, i, o, states=states: states.append((i[0], o)))
                model(tokens, use_cache=False)
            angles = [torch.nn.functional.cosine_similarity(i, o, dim=-1).mean() for i, o in states]
            assert entry.layer == left[int(torch.stack(angles).argmax())]
        else:
            scores = [perplexity_without(folder, gone | {index}, tokens) for index in left]
            assert entry.layer == left[scores.index(min(scores))]
            assert entry.scores["L"] == pytest.approx(min(scores), rel=1e-4)
        gone.add(entry.layer)
    assert result.structure.kept == [index for index in range(4) if index not in gone]


def perplexity_without(folder, gone, tokens) -> float:
    model = without(whole(folder), gone)
    return plain_score("perplexity", model, model, tokens)


@pytest.mark.parametrize("layout", LLAVA_LAYOUTS)
def test_the_language_tower_of_a_llava_gets_smaller(folder, layout, tmp_path):
    make_llava(tmp_path / "llava", **LLAVA_LAYOUTS[layout])
    result = search(folder, tmp_path / "o", model=tmp_path / "llava", path="LG", shards=2)
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not any(report.values()), report
    shape = result.structure.after
    tower = model.config.text_config
    assert (tower.num_hidden_layers, tower.num_key_value_heads, tower.intermediate_size) == (
        *(shape.layers, shape.groups),
        shape.neurons,
    )
    assert (shape.layers, shape.groups) == (3, 3)
    before, after = load_tensors(tmp_path / "llava"), load_tensors(tmp_path / "o")
    outside = {name for name in before if ".layers." not in name or "vision" in name}
    assert outside == {name for name in after if ".layers." not in name or "vision" in name}
    assert all(torch.equal(after[name], before[name]) for name in outside)
    assert model.generate(torch.randint(2, 60, (1, 8)), max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.parametrize("family", entries(list(GROUPED), *GROUPED.keys() - {"llama-3.1", "gemma2", "phi3", "opt"}))
def test_every_family_gets_smaller_loads_and_keeps_each_layers_own_mask(family, tmp_path):
    make_model(tmp_path / "model", family, configs=GROUPED)
    make_tokens(tmp_path / "tokens.npy")
    shallow = search(tmp_path, "shallow", path="LL", scores=False, eval=(str(tmp_path / "tokens.npy"),))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shallow").eval()
    measured = shallow.perplexity[str(tmp_path / "tokens.npy")].after
    assert plain_score("perplexity", loaded, loaded, tokens_of(tmp_path)) == pytest.approx(measured, rel=1e-4)
    assert loaded.config.num_hidden_layers == 2

    result = search(tmp_path, "o", path="GL", shards=2, eval=(str(tmp_path / "tokens.npy"),))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o").eval()
    assert loaded.num_parameters() == result.model.parameters_after
    measured = result.perplexity[str(tmp_path / "tokens.npy")].after
    assert plain_score("perplexity", loaded, loaded, tokens_of(tmp_path)) == pytest.approx(measured, rel=1e-4)
    assert loaded.generate(torch.randint(2, 60, (1, 8)), max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.parametrize(
    "fields",
    entries(
        [{"shards": 3}, {"replicas": 2}, {"shards": 2, "replicas": 2}, {"activations": "device"}],
        str({"shards": 3}),
        str({"replicas": 2}),
    ),
)
def test_sharded_equals_single(folder, fields, tmp_path):
    search_for = {"remove": 0.5, "criterion": "kl", "score": "obs", "keep": "0.2,0.4", "depth_rule": "cosine"}
    one = search(folder, tmp_path / "one", **search_for)
    other = search(folder, tmp_path / "other", **search_for, **fields)
    assert other.structure == one.structure
    assert differing(tmp_path / "one", tmp_path / "other") == []
    kept = [entry.folder for entry in one.structure.path if entry.folder]
    assert len(kept) == 2
    for name in kept:
        assert differing(tmp_path / "one" / name, tmp_path / "other" / name) == []


def test_more_replicas_change_only_the_order_of_sums(folder, tmp_path):
    one = search(folder, tmp_path / "one", path="GLG")
    five = search(folder, tmp_path / "five", path="GLG", replicas=5)
    assert five.structure.after == one.structure.after
    first, second = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "five")
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)


def test_random_paths_follow_their_seed(folder, tmp_path):
    drawn = {
        seed: steps(search(folder, tmp_path / str(seed), remove=0.5, criterion="random", seed=seed, scores=False))
        for seed in range(4)
    }
    again = search(folder, tmp_path / "again", remove=0.5, criterion="random", seed=3)
    assert steps(again) == drawn[3]
    assert len(set(drawn.values())) > 1
    assert all(entry.scores for entry in again.structure.path)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_what_is_removed_is_what_was_asked_for(folder, share, tmp_path):
    result = search(folder, tmp_path / "o", remove=share)
    loaded = whole(tmp_path, "o")
    gone = result.model.parameters_before - loaded.num_parameters()
    one_neuron_of_each_layer = 96 * 4
    assert abs(gone - share * result.model.parameters_before) <= one_neuron_of_each_layer
    assert result.structure.removed == pytest.approx(gone / result.model.parameters_before)


def test_kept_iterations_are_checkpoints_of_shorter_paths(folder, tmp_path):
    result = search(folder, tmp_path / "o", path="GLG", keep=[1, 2])
    assert [entry.folder for entry in result.structure.path] == ["iteration-01", "iteration-02", None]
    for path, name in (("G", "iteration-01"), ("GL", "iteration-02")):
        search(folder, tmp_path / path, path=path)
        assert differing(tmp_path / path, tmp_path / "o" / name) == []
        whole(tmp_path, f"o/{name}").generate(torch.randint(2, 60, (1, 8)), max_new_tokens=2)
    names = {path.name for path in (tmp_path / "o").iterdir()}
    assert not any(name.startswith("layers-") or name == "run.json" for name in names)


def test_groups_stay_where_only_the_mlp_gives(folder, tmp_path):
    mixed = search(folder, tmp_path / "mixed", path="G")
    mlp = search(folder, tmp_path / "mlp", path="G", mlp_only=True)
    assert (mixed.structure.after.groups, mlp.structure.after.groups) == (3, 4)
    assert mlp.structure.after.neurons < mixed.structure.after.neurons
    assert abs(mixed.model.parameters_after - mlp.model.parameters_after) <= 96 * 4
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["model_type"] == "mistral"  # a Llama with three heads of 32 hidden states cannot be said
    assert json.loads((tmp_path / "mlp" / "config.json").read_text())["model_type"] == "llama"


def test_what_is_past_cannot_be_kept_any_more(folder, tmp_path):
    search(folder, tmp_path / "o", path="GL", keep="2")
    with pytest.raises(InputError, match="keep: '1,2' comes too late: iteration 1 is past and was not kept"):
        search(folder, tmp_path / "o", path="GL", keep="1,2")


def test_another_seed_is_another_random_search(folder, tmp_path):
    search(folder, tmp_path / "o", remove=0.3, criterion="random", seed=0, scores=False)
    with pytest.raises(InputError, match="holds another run"):
        search(folder, tmp_path / "o", remove=0.3, criterion="random", seed=1, scores=False)


def test_neurons_stay_a_multiple(folder, tmp_path):
    result = search(folder, tmp_path / "o", path="GLG", neuron_multiple=8)
    assert result.structure.after.neurons % 8 == 0
    assert whole(tmp_path, "o").config.intermediate_size == result.structure.after.neurons


def test_a_shard_may_lose_all_its_layers(folder, tmp_path):
    result = search(folder, tmp_path / "o", path="LL", shards=4)
    held = [worker.layers for worker in result.workers if worker.layers]
    assert held == [(index, index) for index in result.structure.kept]


def test_a_finished_search_is_only_measured_on_more(folder, tmp_path):
    fields = {"path": "GL", "shards": 2}
    first = search(folder, tmp_path / "o", **fields)
    before = snapshot(tmp_path / "o")
    assert search(folder, tmp_path / "o", **fields) == first
    assert snapshot(tmp_path / "o") == before
    again = search(folder, tmp_path / "o", **fields, eval=(str(folder / "other.npy"),))
    fresh = search(folder, tmp_path / "fresh", **fields, eval=(str(folder / "other.npy"),))
    assert again.perplexity == fresh.perplexity
    assert again.structure == first.structure
    after = snapshot(tmp_path / "o")
    assert {name for name in after if after[name] != before.get(name)} == {"README.md", "result.json", "events.jsonl"}


def test_another_search_is_refused(folder, tmp_path):
    search(folder, tmp_path / "o", path="L")
    with pytest.raises(InputError, match="holds another run"):
        search(folder, tmp_path / "o", path="G")


def test_the_stored_dtype_stays(folder, tmp_path):
    make_model(tmp_path / "half", "qwen2", dtype=torch.bfloat16)
    search(folder, tmp_path / "o", model=tmp_path / "half", path="GLG")
    before, after = load_tensors(tmp_path / "half"), load_tensors(tmp_path / "o")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"])
    assert torch.equal(after["model.layers.1.input_layernorm.weight"], before["model.layers.2.input_layernorm.weight"])


def test_projections_are_rounded_to_their_own_dtypes(folder, tmp_path):
    make_model(tmp_path / "mixed", "llama")
    tensors = load_tensors(tmp_path / "mixed")
    halves = {name: t.bfloat16() if "self_attn" in name else t for name, t in tensors.items()}
    save_file(halves, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
    search(folder, tmp_path / "o", model=tmp_path / "mixed", path="G", score="obs")
    after = load_tensors(tmp_path / "o")
    assert after["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    wide = after["model.layers.0.mlp.down_proj.weight"]
    assert wide.dtype == torch.float32
    assert not torch.equal(wide, wide.bfloat16().float())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "remove: missing; give the share of parameters to remove, or a path"),
        ({"remove": 0.9}, "remove: 0.9 is more than the model can give: in iteration"),
        ({"remove": 1.0}, "remove: 1.0 is not allowed; use a number above 0 and below 1"),
        (
            {"path": "LLL"},
            "path: LLL is more than the model can give: in iteration 3 fewer than 2 layers would be left",
        ),
        ({"path": "G" * 20}, "parameters of a layer are more than its"),
        ({"path": "LX"}, "path: 'LX' is not allowed; use the letters L (a layer) and G (groups and neurons)"),
        ({"path": "L", "remove": 0.6}, "path: 'L' is too short: 1 iterations remove"),
        ({"path": "LG", "keep": "3"}, "keep: 3 is beyond the last iteration, which is 2"),
        ({"remove": 0.3, "keep": "0.6"}, "keep: 0.6 is beyond the last iteration, which removes 0.2971"),
        ({"remove": 0.3, "keep": "soon"}, "keep: 'soon' is not allowed; use numbers of iterations such as 8,12"),
        ({"remove": 0.3, "criterion": "best"}, "criterion: 'best' is not allowed; use one of cosine, kl, perplexity"),
        ({"path": "LG", "criterion": "kl"}, "criterion: 'kl' has no effect without a path that is searched for"),
        ({"remove": 0.3, "scores": False}, "scores: False has no effect without a path that is given or random"),
        ({"remove": 0.3, "outlier_m": 3.0}, "outlier_m: 3.0 has no effect without score outlier"),
    ],
    ids=str,
)
def test_bad_input_is_found_before_any_work(folder, fields, message, tmp_path):
    with pytest.raises(InputError) as error:
        search(folder, tmp_path / "o", **fields)
    assert message in str(error.value)
    assert not (tmp_path / "o").exists()
