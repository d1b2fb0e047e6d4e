"""Runs in one process: what is written, and that layout, memory and interruptions do not change it."""

import functools
import json
import pickle
import re
import shutil

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardprune import Recipe
from shardprune.cli import main
from shardprune.cluster.local_backend import LocalBackend
from shardprune.errors import InputError, SolverError, WorkerLost
from shardprune.model.empty_model import attention_of
from shardprune.shard.prune_worker import PruneWorker
from shardprune.solvers.methods import METHODS, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics
from shardprune.storage.relative_paths import absolute_paths
from tests.support.running import run
from tests.support.tiny import CONFIGS, differing, load_tensors, make_model, make_tokens, snapshot

PUBLIC = ("magnitude", "wanda", "sparsegpt")
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
    [("sparsegpt", "unstructured"), ("sparsegpt", "2:4"), ("wanda", "unstructured"), ("magnitude", "3:8")],
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


# -- interruptions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"shards": 2},
        {"weights": "streamed"},
        {"propagation": "parallel", "shards": 2},
        {"propagation": "parallel", "shards": 4, "weights": "streamed"},
    ],
    ids=str,
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(folder, fields, dies_at_layer, tmp_path):
    fields = {"sparsity": 0.5, "eval": (str(folder / "other.npy"),), **fields}
    undisturbed = run(folder, tmp_path / "plain", **fields)
    dies_at_layer(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", **fields)
    assert not (tmp_path / "cut" / "result.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("model-*")}
    assert len(finished) == 3
    resumed = run(folder, tmp_path / "cut", **fields)
    assert differing(tmp_path / "plain", tmp_path / "cut") == []
    assert {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in finished} == finished
    assert resumed.perplexity == undisturbed.perplexity
    assert resumed.sparsity == undisturbed.sparsity


def test_a_parallel_run_goes_on_with_fewer_shards_and_the_same_segments(folder, dies_at_layer, tmp_path):
    fields = {"sparsity": 0.5, "propagation": "parallel"}
    run(folder, tmp_path / "plain", shards=4, **fields)
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", shards=4, **fields)
    result = run(folder, tmp_path / "cut", shards=2, **fields)
    assert len(result.workers) == 2
    assert differing(tmp_path / "plain", tmp_path / "cut") == []


def test_a_finished_run_is_not_done_again(folder, tmp_path):
    first = run(folder, tmp_path / "o", sparsity=0.5)
    before = snapshot(tmp_path / "o")
    again = run(folder, tmp_path / "o", sparsity=0.5, shards=2)
    assert again == first
    assert snapshot(tmp_path / "o") == before


def test_a_finished_run_can_be_measured_on_more(folder, tmp_path):
    run(folder, tmp_path / "o", sparsity=0.5)
    layers = {name: data for name, data in snapshot(tmp_path / "o").items() if name.startswith("model-")}
    result = run(folder, tmp_path / "o", sparsity=0.5, eval=(str(folder / "other.npy"),))
    assert result.perplexity[str(folder / "other.npy")].after is not None
    assert {name: data for name, data in snapshot(tmp_path / "o").items() if name in layers} == layers


def test_a_measurement_on_another_text_is_not_taken_for_this_one(folder, tmp_path):
    source = tmp_path / "eval.npy"
    make_tokens(source, samples=5, seed=2)
    first = run(folder, tmp_path / "o", sparsity=0.5, eval=(str(source),)).perplexity[str(source)]
    make_tokens(source, samples=5, seed=3)
    second = run(folder, tmp_path / "o", sparsity=0.5, eval=(str(source),)).perplexity[str(source)]
    assert first.tokens_sha256 != second.tokens_sha256
    assert (first.before, first.after) != (second.before, second.after)
    fresh = run(folder, tmp_path / "fresh", sparsity=0.5, eval=(str(source),)).perplexity[str(source)]
    assert second == fresh


def test_a_layer_that_cannot_be_solved_names_the_projection(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tensors = load_tensors(tmp_path / "model")
    tensors["model.layers.2.post_attention_layernorm.weight"][3] = float("inf")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SolverError, match=r"layer 2 mlp\.gate_proj: its inputs are not finite"):
        run(folder, tmp_path / "o", model=tmp_path / "model", sparsity=0.5)
    assert len(list((tmp_path / "o").glob("model-*"))) == 2  # the layers before it are kept


@pytest.mark.parametrize("settings", [{}, {"structured": 0.2}], ids=["sparse", "structured"])
def test_a_weight_that_overflows_when_it_is_stored_ends_the_run(folder, tmp_path, settings):
    """What is pruned moves into the remaining weights of a layer, which float16 cannot hold."""
    make_model(tmp_path / "model", dtype=torch.float16)
    tensors = load_tensors(tmp_path / "model")
    name = "model.layers.1.self_attn.o_proj.weight" if settings else "model.layers.1.mlp.up_proj.weight"
    tensors[name] = 65000 - tensors[name].abs()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    part = name.removeprefix("model.layers.1.").removesuffix(".weight").replace(".", r"\.")
    with pytest.raises(SolverError, match=rf"^layer 1 {part}: the (pruned|corrected) weight overflows float16"):
        run(folder, tmp_path / "o", model=tmp_path / "model", sparsity=0.5, **settings)
    files = [load_file(file) for file in (tmp_path / "o").rglob("*.safetensors")]
    assert files
    assert all(torch.isfinite(tensor).all() for file in files for tensor in file.values())


@pytest.mark.parametrize("weights", ["resident", "streamed"])
def test_a_model_file_that_is_cut_off_under_a_run_is_one_line(tmp_path, monkeypatch, weights, capsys):
    make_model(tmp_path / "model", max_shard_size="20KB")
    make_tokens(tmp_path / "tokens.npy")
    embed = PruneWorker.embed

    @functools.wraps(embed)
    def cutting(self, tokens):
        for file in (tmp_path / "model").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-100])
        monkeypatch.setattr(PruneWorker, "embed", embed)
        return embed(self, tokens)

    monkeypatch.setattr(PruneWorker, "embed", cutting)
    source = str(tmp_path / "tokens.npy")
    arguments = ["--sparsity", "0.5", "--calibration", source, "--samples", "12", "--seqlen", "24"]
    place = ["--backend", "local", "--weights", weights, "--out", str(tmp_path / "o"), "--no-report"]
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(tmp_path / "model"), *arguments, *place])
    error = capsys.readouterr().err.splitlines()[-1]
    assert caught.value.code == 1
    assert re.match(
        r"error: model: the model changed under the run: .*\.safetensors is not the file that it was", error
    )


def test_leftovers_of_an_interrupted_write_are_removed(folder, tmp_path, dies_at_layer):
    dies_at_layer(2)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", sparsity=0.5)
    (tmp_path / "o" / ".model-00004-of-00005.safetensors.0123abcd.tmp").write_bytes(b"half a layer")
    run(folder, tmp_path / "o", sparsity=0.5)
    assert not list((tmp_path / "o").glob(".*"))


def test_what_a_lost_worker_left_behind_is_removed(folder, tmp_path, monkeypatch):
    """A worker that dies while it writes leaves its temporary file; the same driver goes on."""
    write = PruneWorker.write

    @functools.wraps(write)
    def dying(self, index, record):
        (tmp_path / "o" / ".model-00004-of-00005.safetensors.0123abcd.tmp").write_bytes(b"half a layer")
        monkeypatch.setattr(PruneWorker, "write", write)
        raise WorkerLost("killed")

    monkeypatch.setattr(PruneWorker, "write", dying)
    monkeypatch.setattr(LocalBackend, "replaces", True)
    monkeypatch.setattr(LocalBackend, "settle", LocalBackend.slots)
    assert run(folder, tmp_path / "o", sparsity=0.5).restarts == 1
    assert not list((tmp_path / "o").glob(".*"))


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 13}, "samples: 13 is more than the 12 rows"),
        ({"replicas": 13}, "replicas: 13 is more than the 12 samples"),
        ({"shards": 5}, "shards: 5 is more than the model's 4 layers"),
        ({"seqlen": 65}, "seqlen: 65 is more than the model's 64 positions"),
        ({"device": "cuda"}, "device: 'cuda' needs a GPU"),
        ({"calibration": "stdlib"}, "model: .* holds no tokenizer"),
        ({"model": "nowhere"}, "model: .*nowhere' is no directory"),
        ({"model": "foo://x"}, "model: 'foo://x' cannot be opened: "),
        ({"calibration": "foo://x.txt"}, "calibration: 'foo://x.txt' cannot be opened: "),
        ({"calibration": "foo://x.npy"}, "calibration: 'foo://x.npy' cannot be opened: "),
        ({"calibration": "/"}, "calibration: '/' is no known source"),
        ({"calibration": "/no/such.txt"}, "calibration: '/no/such.txt' does not exist"),
        ({"eval": "/no/such.txt"}, "eval: '/no/such.txt' does not exist"),
        ({"backend": "ray", "model": "memory://x"}, "model: .* lives in this process's memory; use backend local"),
    ],
)
def test_bad_input_leaves_no_output(folder, fields, message, tmp_path):
    if "device" in fields and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=message):
        run(folder, tmp_path / "o", **{"sparsity": 0.5, **fields})
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("changed", [{"sparsity": 0.6}, {"method": "wanda"}, {"seqlen": 24, "wave": 3}])
def test_another_runs_output_is_never_touched(folder, state, changed, dies_at_layer, tmp_path):
    if state == "unfinished":
        dies_at_layer(1)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "o", sparsity=0.5)
    else:
        run(folder, tmp_path / "o", sparsity=0.5)
    before = snapshot(tmp_path / "o")
    with pytest.raises(InputError, match="out: .* holds another run; choose an empty directory"):
        run(folder, tmp_path / "o", **{"sparsity": 0.5, **changed})
    assert snapshot(tmp_path / "o") == before


def test_a_layer_that_storage_has_damaged_is_made_again(folder, dies_at_layer, tmp_path):
    run(folder, tmp_path / "whole", sparsity=0.5)
    dies_at_layer(3)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", sparsity=0.5)
    damaged = tmp_path / "o" / "model-00003-of-00005.safetensors"  # of layer 1
    damaged.write_bytes(damaged.read_bytes()[:-10])
    run(folder, tmp_path / "o", sparsity=0.5)
    assert differing(tmp_path / "whole", tmp_path / "o") == []


def test_a_directory_of_other_things_is_never_touched(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter one")
    with pytest.raises(InputError, match="out: .* is not empty and holds no run"):
        run(folder, tmp_path, sparsity=0.5)
    assert snapshot(tmp_path) == {"thesis.txt": b"chapter one"}


@pytest.mark.parametrize(
    "content", ["", "[]", "garbage", '{"recipe": 5}', '{"recipe": {"segments": 9, "threads": 64}}']
)
def test_a_record_that_is_not_ours_is_another_run(folder, content, tmp_path):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(InputError, match="out: .* holds another run"):
        run(folder, tmp_path, sparsity=0.5, propagation="parallel", shards=2)
    assert snapshot(tmp_path) == {"result.json": content.encode()}


def test_an_output_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out: .* cannot be written"):
        run(folder, tmp_path / "file" / "sub", sparsity=0.5)


def test_credentials_stay_out_of_errors_and_records(folder, tmp_path):
    with pytest.raises(InputError) as caught:
        run(folder, tmp_path / "o", sparsity=0.5, calibration="nope://user:SECRET@host/x.txt")
    assert "SECRET" not in str(caught.value)
    assert "SECRET" not in str(pickle.loads(pickle.dumps(caught.value)))
    recipe = Recipe.checked({"model": "s3://key:SECRET@b/m?token=SECRET", "out": "o", "sparsity": 0.5})
    assert recipe.record()["model"] == "s3://b/m"


def test_no_resume_refuses_what_is_there(folder, tmp_path):
    run(folder, tmp_path / "o", sparsity=0.5)
    with pytest.raises(InputError, match="out: .* holds a run already"):
        run(folder, tmp_path / "o", sparsity=0.5, resume=False)


def test_another_model_of_the_same_shape_is_another_run(folder, tmp_path):
    run(folder, tmp_path / "o", sparsity=0.5)
    shutil.copytree(folder / "model", tmp_path / "tuned")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for parameter in model.parameters():
        parameter.data *= 1.01
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(InputError, match="holds another run"):
        run(folder, tmp_path / "o", model=tmp_path / "tuned", sparsity=0.5)


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
