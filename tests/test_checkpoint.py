"""Checkpoints on any file system, and the damage that is found before any work."""

import json
import shutil

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shardprune.checkpoint import INDEX, Checkpoint
from shardprune.errors import InputError
from shardprune.safetensors_file import read_header, read_tensor, write_tensors
from shardprune.storage import Folder
from tests.tiny import load_tensors, make_model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("sharded"), max_shard_size="20KB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", ["one", "several"])
@pytest.mark.parametrize("place", ["path", "file", "memory"])
def test_tensors_are_read_as_the_library_reads_them(tmp_path, dtype, shards, place):
    make_model(tmp_path, dtype=dtype, **({"max_shard_size": "20KB"} if shards == "several" else {}))
    assert (tmp_path / INDEX).exists() == (shards == "several")
    url = {"path": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}[place]
    if place == "memory":
        fsspec.filesystem("memory").put(f"{tmp_path}/", f"/{tmp_path.name}/", recursive=True)
    checkpoint = Checkpoint(url)
    expected = load_tensors(tmp_path)
    assert checkpoint.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype
        assert torch.equal(read, tensor)


def test_written_files_are_read_by_the_library(tmp_path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(2, 2, 2),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "transposed": torch.randn(4, 6).t(),
        "flags": torch.tensor([True, False]),
    }
    folder = Folder(str(tmp_path / "new"))
    write_tensors(folder, "x.safetensors", tensors, {"note": "kept"})
    found = load_file(tmp_path / "new" / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "new" / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    entries, metadata = read_header(folder, "x.safetensors")
    assert metadata["note"] == "kept"
    assert torch.equal(read_tensor(folder, entries["transposed"]), tensors["transposed"])


def test_a_write_that_fails_leaves_nothing(tmp_path):
    folder = Folder(str(tmp_path))

    def parts():
        yield b"half"
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        folder.write("file", parts())
    assert folder.names() == []


def test_identity_tells_models_apart_but_not_copies(tmp_path, sharded):
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    assert Checkpoint(sharded).identity() == Checkpoint(str(copy)).identity()
    file = next(copy.glob("*.safetensors"))
    tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    assert Checkpoint(sharded).identity() != Checkpoint(str(copy)).identity()


def damaged(sharded: str, tmp_path, damage) -> str:
    copy = tmp_path / "damaged"
    shutil.copytree(sharded, copy)
    damage(copy)
    return str(copy)


def truncate(copy):
    file = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])


def truncate_header(copy):
    file = next(copy.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])


def replace(copy):
    next(copy.glob("*.safetensors")).write_bytes(b"this is no safetensors file, but it is long enough to be one")


def empty(copy):
    next(copy.glob("*.safetensors")).write_bytes(b"")


def misplace(copy):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["model.layers.9.ghost"] = next(iter(index["weight_map"].values()))
    (copy / INDEX).write_text(json.dumps(index))


def remove_shard(copy):
    next(copy.glob("*.safetensors")).unlink()


def break_index(copy):
    (copy / INDEX).write_text("{")


def remove_config(copy):
    (copy / "config.json").unlink()


def remove_weights(copy):
    for file in copy.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated or damaged: it has"),
        (truncate_header, "is truncated or not a safetensors file"),
        (replace, "is not a safetensors file"),
        (empty, "is not a safetensors file"),
        (misplace, "places model.layers.9.ghost in .*, which has no such tensor"),
        (remove_shard, "does not exist"),
        (break_index, "cannot be read as an index"),
        (remove_config, "holds no config.json"),
        (remove_weights, "holds neither model.safetensors nor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_an_input_error(tmp_path, sharded, damage, message):
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint(damaged(sharded, tmp_path, damage))
    assert caught.value.field == "model"


@pytest.mark.parametrize("model", ["missing", "../missing/model", "/no/such/place"])
def test_a_missing_model_is_an_input_error(model):
    with pytest.raises(InputError, match="is no directory, no URL and no hub name"):
        Checkpoint(model)


def test_a_checkpoint_without_tokenizer_says_so(sharded):
    with pytest.raises(InputError, match="holds no tokenizer"):
        Checkpoint(sharded).tokenizer()
