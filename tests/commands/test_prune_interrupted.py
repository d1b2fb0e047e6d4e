"""Runs that are cut off, fail or are done already: what stays, and what the same command makes of it."""

import functools
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardprune.cli import main
from shardprune.cluster.local_backend import LocalBackend
from shardprune.errors import SolverError, WorkerLost
from shardprune.shard.prune_worker import PruneWorker
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_model, make_tokens, snapshot


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
