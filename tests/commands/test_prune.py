"""Runs in one process: what is written, and that layout and memory do not change it."""

import json

import fsspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.cluster.local_backend import LocalBackend
from shardprune.errors import InputError
from shardprune.model.empty_model import attention_of
from shardprune.solvers.methods import METHODS, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics
from shardprune.storage.relative_paths import absolute_paths
from tests.support.running import run
from tests.support.tiny import CONFIGS, differing, load_tensors, make_model, make_tokens, snapshot

PUBLIC = ("magnitude", "wanda", "sparsegpt", "alps")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plain_pruned(folder, method: str, pattern: str, sparsity: float) -> dict[str, torch.Tensor]:
    """The papers' loop over a whole model: gather a layer's inputs, prune it, run it again."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa").eval()
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    for index, layer in enumerate(model.model.layers):
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        gathered = {name: InputStatistics.empty("gram", linear.in_features) for name, linear in linears.items()}
        hooks = [
            linear.register_forward_pre_hook(
                lambda _m, inputs, name=name: gathered[name].add(inputs[0], len(inputs[0]))
            )
            for name, linear in linears.items()
        ]
        with torch.no_grad():
            for wave in tokens.split(4):
                model(wave)  # the layers below are pruned already, this one and those above are dense
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            target = Target(linear.weight.data, parse_pattern(pattern), sparsity)
            (solution,) = METHODS[method].solve([target], gathered[name])
            linear.weight.data.copy_(solution.weight)
        assert index < 4
    return model.state_dict()


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("sparsegpt", "unstructured"), ("sparsegpt", "2:4"), ("wanda", "unstructured"), ("alps", "3:8")],
)
def test_equals_the_loop_over_a_whole_model(folder, method, pattern, tmp_path):
    fields = {"sparsity": 0.5} if pattern == "unstructured" else {"pattern": pattern}
    result = run(folder, tmp_path / "o", method=method, shards=2, **fields)
    expected = plain_pruned(folder, method, pattern, result.sparsity.target)
    found = load_tensors(tmp_path / "o")
    for name, tensor in found.items():
        assert torch.equal(tensor == 0, expected[name] == 0), name
        assert torch.allclose(tensor, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_sharded_equals_single_and_loads(family, tmp_path, device):
    make_model(tmp_path / "model", family)
    make_tokens(tmp_path / "tokens.npy")
    fields = {"sparsity": 0.5, "device": device, "eval": (str(tmp_path / "tokens.npy"),)}
    single = run(tmp_path, "single", **fields)
    sharded = run(tmp_path, "sharded", shards=3, weights="streamed", **fields)
    assert differing(tmp_path / "single", tmp_path / "sharded") == []
    assert single.perplexity == sharded.perplexity
    assert single.sparsity.achieved == pytest.approx(0.5, abs=1e-3)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "single")
    written = load_tensors(tmp_path / "single")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in written.items())
    ids = torch.randint(2, 60, (1, 8))
    assert loaded.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.parametrize(
    "fields",
    [
        {"shards": 4},
        {"weights": "streamed"},
        {"weights": "streamed", "shards": 2},
        {"activations": "device"},
        {"measure_error": False},
    ],
    ids=str,
)
def test_layout_and_memory_do_not_change_a_bit(folder, fields, tmp_path):
    run(folder, tmp_path / "plain", method="wanda", sparsity=0.6)
    run(folder, tmp_path / "other", method="wanda", sparsity=0.6, **fields)
    assert differing(tmp_path / "plain", tmp_path / "other") == []


@pytest.mark.parametrize("method", PUBLIC)
def test_replicas_change_only_the_order_of_sums(folder, method, tmp_path):
    run(folder, tmp_path / "one", method=method, sparsity=0.5)
    run(folder, tmp_path / "three", method=method, sparsity=0.5, replicas=3, shards=2)
    one, three = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "three")
    for name in one:
        assert torch.equal(one[name] == 0, three[name] == 0), name
        assert torch.allclose(one[name], three[name], rtol=1e-4, atol=1e-5), name


def test_parallel_is_exact_inside_a_segment(folder, tmp_path):
    fields = {"method": "sparsegpt", "sparsity": 0.5}
    exact = tmp_path / "exact"
    run(folder, exact, **fields)
    run(folder, tmp_path / "one", propagation="parallel", shards=1, **fields)
    assert differing(exact, tmp_path / "one") == []

    run(folder, tmp_path / "two", propagation="parallel", shards=2, **fields)
    run(folder, tmp_path / "streamed", propagation="parallel", shards=2, weights="streamed", **fields)
    run(folder, tmp_path / "fewer", propagation="parallel", shards=1, segments=2, **fields)
    assert differing(tmp_path / "two", tmp_path / "streamed") == []
    assert differing(tmp_path / "two", tmp_path / "fewer") == []
    changed = {name.split(".")[2] for name in differing(exact, tmp_path / "two")}
    assert changed == {"2", "3"}  # the first segment sees no boundary


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_stays_and_the_rest_is_copied(folder, dtype, tmp_path):
    make_model(tmp_path / "half", "qwen2", dtype=dtype)
    result = run(folder, tmp_path / "o", model=tmp_path / "half", sparsity=0.5, shards=2)
    before, after = load_tensors(tmp_path / "half"), load_tensors(tmp_path / "o")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if not name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS)):
            assert torch.equal(tensor, before[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype="auto")
    assert loaded.dtype == dtype
    assert result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.37), ("2:4", None), ("1:3", None)])
@pytest.mark.parametrize("method", PUBLIC)
def test_achieved_is_counted_on_what_is_written(folder, method, pattern, sparsity, tmp_path):
    result = run(folder, tmp_path / "o", method=method, pattern=pattern, sparsity=sparsity)
    tensors = load_tensors(tmp_path / "o")
    zeros = weights = 0
    for report in result.sparsity.projections:
        weight = tensors[f"model.layers.{report.layer}.{report.name}.weight"]
        zeros, weights = zeros + int((weight == 0).sum()), weights + weight.numel()
        assert report.achieved == float((weight == 0).double().mean())
        assert parse_pattern(pattern).holds(weight)
        assert report.error is not None
        assert 0 < report.error < 1
    assert result.sparsity.achieved == zeros / weights
    assert len(result.sparsity.projections) == 4 * 7
    if sparsity:
        assert abs(zeros - sparsity * weights) <= 4 * 7


def test_perplexity_is_that_of_the_whole_model(folder, tmp_path):
    source = str(folder / "other.npy")
    result = run(folder, tmp_path / "o", sparsity=0.5, shards=2, replicas=2, eval=(source,))
    tokens = torch.from_numpy(np.load(source))
    for model, measured in ((folder / "model", "before"), (tmp_path / "o", "after")):
        whole = AutoModelForCausalLM.from_pretrained(model).eval()
        with torch.no_grad():
            logits = whole(tokens).logits[:, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert getattr(result.perplexity[source], measured) == pytest.approx(float(losses.exp()), rel=1e-5)
    assert result.perplexity[source].windows == 7


def test_result_json_holds_the_contract(folder, tmp_path):
    result = run(folder, tmp_path / "o", sparsity=0.5, shards=2, replicas=2, eval=(str(folder / "other.npy"),))
    stored = json.loads((tmp_path / "o" / "result.json").read_text())
    assert absolute_paths(stored, str(tmp_path / "o")) == result.as_json()
    assert stored["version"] == 1
    assert stored["command"] == "prune"
    assert stored["recipe"]["sparsity"] == 0.5
    assert stored["model"]["parameters_before"] == stored["model"]["parameters_after"]
    assert {"plan", "load", "prune", "write", "evaluate", "total"} <= stored["seconds"].keys()
    assert [(worker["shard"], worker["replica"]) for worker in stored["workers"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert stored["workers"][2]["layers"] == [2, 3]
    assert all(worker["peak_bytes"] > 0 and worker["busy_seconds"] > 0 for worker in stored["workers"])
    assert stored["restarts"] == 0
    assert not (tmp_path / "o" / "run.json").exists()


def test_memory_urls(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder / 'model'}/", "/in/", recursive=True)
    run(folder, "memory://out/x", model="memory://in", sparsity=0.5)
    run(folder, tmp_path / "o", sparsity=0.5)
    memory.get("/out/x/", f"{tmp_path / 'fetched'}/", recursive=True)
    assert differing(tmp_path / "o", tmp_path / "fetched") == []
    assert snapshot(tmp_path / "o").keys() == snapshot(tmp_path / "fetched").keys()


def test_attention_is_the_same_wherever_a_family_has_no_other():
    from transformers import Gemma2Config, LlamaConfig

    assert attention_of(LlamaConfig()) == "sdpa"
    assert attention_of(Gemma2Config()) == "eager"


def test_an_output_is_free_again_where_no_worker_can_start(folder, tmp_path, monkeypatch):
    def start(*_):
        raise InputError("address", "the cluster did not free 2 x CPU")

    with monkeypatch.context() as without_room:
        without_room.setattr(LocalBackend, "start", start)
        with pytest.raises(InputError):
            run(folder, tmp_path / "o", sparsity=0.5)
    assert list((tmp_path / "o").iterdir()) == []
    assert run(folder, tmp_path / "o", method="wanda", sparsity=0.5).restarts == 0
