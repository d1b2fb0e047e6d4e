"""Outputs whose files are not what was written: made again by the same command, or refused in one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shardprune.errors import InputError
from shardprune.report.progress import Reporter
from tests.support.dying import dying_at
from tests.support.running import run, search_run
from tests.support.tiny import differing, snapshot

LAYER, FRAME = "model-00003-of-00005.safetensors", "model-00001-of-00005.safetensors"
INDEX = "model.safetensors.index.json"
PROJECTION = "model.layers.1.mlp.up_proj.weight"


class Listening(Reporter):
    """A reporter that keeps what it is told to say."""

    def __init__(self):
        super().__init__(quiet=True)
        self.said = []

    def say(self, text):
        self.said.append(text)


def rewritten(file, change):
    """Save a safetensors file again with the same metadata, and other tensors."""
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, file, metadata)


def other_data(out):
    rewritten(out / LAYER, lambda tensors, _: tensors[PROJECTION][0].add_(1))


def one_bit(out):
    content = bytearray((out / LAYER).read_bytes())
    content[-1000] ^= 4
    (out / LAYER).write_bytes(content)


def other_dtype(out):
    rewritten(out / LAYER, lambda tensors, _: tensors.update({PROJECTION: tensors[PROJECTION].half()}))


def other_shape(out):
    rewritten(out / LAYER, lambda tensors, _: tensors.update({PROJECTION: tensors[PROJECTION].reshape(-1, 16)}))


def tensor_gone(out):
    rewritten(out / LAYER, lambda tensors, _: tensors.pop(PROJECTION))


def zeros_that_were_not_counted(out):
    def lie(tensors, metadata):
        record = json.loads(metadata["shardprune"])
        record["projections"][0]["zeros"] += 7
        metadata["shardprune"] = json.dumps(record)

    rewritten(out / LAYER, lie)


def truncated(out):
    os.truncate(out / LAYER, 3000)


def no_header(out):
    (out / LAYER).write_bytes(b"x" * 5000)


def gone(out):
    (out / LAYER).unlink()


LAYER_DAMAGES = [
    other_data,
    one_bit,
    other_dtype,
    other_shape,
    tensor_gone,
    zeros_that_were_not_counted,
    truncated,
    no_header,
    gone,
]


@pytest.fixture(scope="module")
def plain(folder):
    """A finished output."""
    run(folder, "plain", sparsity=0.5)
    return folder / "plain"


@pytest.fixture(scope="module")
def unfinished(folder, tmp_path_factory):
    """An output with two of four layers."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with dying_at(2), pytest.raises(KeyboardInterrupt):
        run(folder, out, sparsity=0.5)
    assert (out / LAYER).is_file()
    return out


@pytest.mark.parametrize("damage", LAYER_DAMAGES, ids=lambda damage: damage.__name__)
def test_a_finished_layer_that_is_damaged_is_made_again(folder, plain, unfinished, tmp_path, damage):
    out = shutil.copytree(unfinished, tmp_path / "out")
    damage(out)
    listening = Listening()
    result = run(folder, out, reporter=listening, sparsity=0.5)
    assert differing(plain, out) == []
    assert result.sparsity.achieved == 0.5
    if damage is not gone:
        assert any(LAYER in line and line.endswith("layer 1 is made again") for line in listening.said)


# -- finished outputs -------------------------------------------------------------------------------------------


def removal_of(name):
    return lambda out: (out / name).unlink()


def cut_of(name):
    return lambda out: os.truncate(out / name, (out / name).stat().st_size - 7)


FINISHED = {
    **{f"{name} removed": removal_of(name) for name in (LAYER, FRAME, INDEX, "config.json", "generation_config.json")},
    **{f"{name} cut": cut_of(name) for name in (LAYER, FRAME, INDEX, "config.json")},
    "another header": other_dtype,
}


@pytest.mark.parametrize("damage", FINISHED.values(), ids=FINISHED)
def test_a_finished_output_that_is_damaged_is_made_whole_again(folder, plain, tmp_path, damage):
    out = shutil.copytree(plain, tmp_path / "out")
    damage(out)
    listening = Listening()
    run(folder, out, reporter=listening, sparsity=0.5)
    assert any(line.endswith("it is made again") for line in listening.said)
    assert differing(plain, out) == []
    before, after = snapshot(plain), snapshot(out)
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    assert before.keys() - same <= {"result.json", "events.jsonl"}
    listening.said.clear()
    run(folder, out, reporter=listening, sparsity=0.5)
    assert listening.said == [f"{out} is finished already"]


def test_measurements_of_a_damaged_output_stay(folder, tmp_path):
    fields = {"sparsity": 0.5, "eval": (str(folder / "other.npy"),)}
    first = run(folder, tmp_path / "out", **fields)
    content = json.loads((tmp_path / "out" / "result.json").read_text())
    content["evaluation"] = {"perplexity": {"x": {"value": 3.0, "seqlen": 2, "windows": 1, "tokens_sha256": ""}}}
    (tmp_path / "out" / "result.json").write_text(json.dumps(content))
    (tmp_path / "out" / LAYER).unlink()
    again = run(folder, tmp_path / "out", **fields)
    assert again.perplexity == first.perplexity
    assert again.evaluation.perplexity["x"].value == 3.0


def test_a_composite_is_made_again_from_its_start(folder, tmp_path):
    run(folder, tmp_path / "plain", structured=0.3, sparsity=0.5)
    out = shutil.copytree(tmp_path / "plain", tmp_path / "out")
    (out / LAYER).unlink()
    run(folder, out, structured=0.3, sparsity=0.5)
    assert differing(tmp_path / "plain", out) == []
    assert not (out / "structured").exists()


def test_a_search_leads_nowhere_back(folder, tmp_path):
    fields = {"path": "L", "depth_rule": "third-last"}
    search_run(folder, tmp_path / "out", **fields)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(InputError) as caught:
        search_run(folder, tmp_path / "out", **fields)
    refused = f"out: {tmp_path}/out is not whole: config.json is missing; choose an empty directory"
    assert str(caught.value) == refused


# -- what was decided ---------------------------------------------------------------------------------------------


def test_a_run_keeps_its_threads(folder, plain, unfinished, tmp_path):
    out = shutil.copytree(unfinished, tmp_path / "out")
    listening = Listening()
    result = run(folder, out, reporter=listening, sparsity=0.5, threads=2)
    assert result.recipe["threads"] == 1
    assert "threads: the run keeps 1 for each worker, with which it began" in listening.said
    assert differing(plain, out) == []


# -- records of another shape ---------------------------------------------------------------------------------------

SHAPES = {
    "run.json": {
        "restarts": "x",
        "outliers": 3,
        "perplexity": {"a": 1},
        "recipe": [],
        "inputs": {"model": {}},
        "saved": "../x",
        "path": [{"iteration": "x"}],
        "unknown": 1,
    },
    "result.json": {
        "model": [],
        "perplexity": {"a": {}},
        "seconds": {},
        "workers": [{"shard": "x"}],
        "files": {"a": 1},
        "recipe": {"model": 3},
        "restarts": None,
        "structure": {"path": []},
    },
}
CASES = [(file, name, value) for file, fields in SHAPES.items() for name, value in fields.items()]


@pytest.mark.parametrize(("file", "name", "value"), CASES, ids=[f"{file} {name}" for file, name, _ in CASES])
def test_a_record_of_another_shape_is_one_line(folder, plain, unfinished, tmp_path, file, name, value):
    out = shutil.copytree(unfinished if file == "run.json" else plain, tmp_path / "out")
    content = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps({**content, name: value}))
    with pytest.raises(InputError) as caught:
        run(folder, out, sparsity=0.5)
    assert str(caught.value).startswith(f"out: {out}/{file} ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["run.json", "result.json"])
@pytest.mark.parametrize("content", ["[]", "null", "3", '"x"', "{", "", "[" * 100_000, "\x00"])
def test_what_is_no_record_is_another_run(folder, plain, unfinished, tmp_path, file, content):
    out = shutil.copytree(unfinished if file == "run.json" else plain, tmp_path / "out")
    (out / file).write_text(content)
    with pytest.raises(InputError, match=f"^out: {out} holds another run; choose an empty directory$"):
        run(folder, out, sparsity=0.5)


@pytest.mark.parametrize("threads", ["x", 0, True, 1.5])
def test_threads_that_none_has_recorded(folder, unfinished, tmp_path, threads):
    out = shutil.copytree(unfinished, tmp_path / "out")
    content = json.loads((out / "run.json").read_text())
    content["recipe"]["threads"] = threads
    (out / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="^out: the recipe that .* holds "):
        run(folder, out, sparsity=0.5)


def test_zeros_are_counted_and_not_believed(folder, tmp_path):
    run(folder, tmp_path / "out", sparsity=0.5)
    with safe_open(tmp_path / "out" / LAYER, "pt") as opened:
        record = json.loads(opened.metadata()["shardprune"])
        counts = {p["name"]: (p["zeros"], p["weights"]) for p in record["projections"]}
        for name, (zeros, weights) in counts.items():
            tensor = opened.get_tensor(f"model.layers.1.{name}.weight")
            assert (int((tensor == 0).sum()), tensor.numel()) == (zeros, weights)
            assert torch.isfinite(tensor).all()
