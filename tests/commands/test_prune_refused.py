"""Runs that are refused: bad input, and outputs that are another's."""

import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune import Recipe
from shardprune.errors import InputError
from tests.support.running import run
from tests.support.tiny import differing, snapshot


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 13}, "samples: 13 is more than the 12 rows"),
        ({"replicas": 13}, "replicas: 13 is more than the 12 samples"),
        (
            {"replicas": 9, "reconstruct": 1},
            "replicas: 9 is more than the 8 of 12 samples that are not held out",
        ),
        ({"replicas": 9, "refit": True}, "replicas: 9 is more than the 8 of 12 samples that are not held out"),
        ({"shards": 5}, "shards: 5 is more than the model's 4 layers"),
        ({"seqlen": 65}, "seqlen: 65 is more than the model's 64 positions"),
        ({"device": "cuda"}, "device: 'cuda' needs a GPU"),
        ({"calibration": "stdlib"}, "model: .* holds no tokenizer"),
        ({"model": "nowhere"}, "model: .*nowhere' is no directory"),
        ({"model": "foo://x"}, "model: 'foo://x' cannot be opened: "),
        ({"calibration": "foo://x.txt"}, "calibration: 'foo://x.txt' cannot be opened: "),
        ({"calibration": "foo://x.npy"}, "calibration: 'foo://x.npy' cannot be opened: "),
        ({"calibration": "self", "self_temperature": 1e-4}, "self_temperature: .* greater than or equal to 0.001"),
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
