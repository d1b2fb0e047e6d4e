"""Checkpoints on any file system, and the damage that is found before any work."""

import gc
import json
import shutil
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
import torch
from fsspec.spec import AbstractBufferedFile
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.model.checkpoint import INDEX, Checkpoint, locate
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import read_header, read_tensor, write_tensors
from tests.support.architectures import DENSE, make_architecture
from tests.support.running import run
from tests.support.tiny import CONFIGS, load_tensors, make_model, make_tokens
from tests.support.words import words_tokenizer


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
    folder = Folder(str(tmp_path / "new"), "out")
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
    folder = Folder(str(tmp_path), "out")

    def parts():
        yield b"half"
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        folder.write("file", parts)
    assert folder.names() == []


class Store(fsspec.AbstractFileSystem):
    """An object store's manners: a file appears when its upload ends, and closing it ends the upload."""

    protocol = "s3"
    objects: ClassVar[dict[str, bytes]] = {}

    def _open(self, path, mode="rb", **kwargs):
        return Upload(self, path, mode, **kwargs)


class Upload(AbstractBufferedFile):
    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):
        self.parts.append(self.buffer.getvalue())
        if final:
            Store.objects[self.path] = b"".join(self.parts)


@pytest.mark.parametrize("fails", [False, True])
def test_an_upload_that_fails_never_appears(tmp_path, fails):
    folder = Folder(str(tmp_path), "out")
    folder.fs, folder.root = Store(), "bucket/run"

    def parts():
        for _ in range(3):
            yield bytes(3 * 2**20)
        if fails:
            raise KeyboardInterrupt

    Store.objects.clear()
    if fails:
        with pytest.raises(KeyboardInterrupt):
            folder.write("x", parts)
        gc.collect()
        assert Store.objects == {}
    else:
        folder.write("x", parts)
        assert Store.objects == {"bucket/run/x": bytes(9 * 2**20)}


def test_identity_tells_models_apart_but_not_copies(tmp_path, sharded):
    copy = tmp_path / "copy"
    shutil.copytree(sharded, copy)
    assert Checkpoint(sharded).identity() == Checkpoint(str(copy)).identity()
    for file in copy.glob("*.safetensors"):  # one tensor in one of the files
        tensors = load_file(file)
        if "model.layers.2.mlp.up_proj.weight" in tensors:
            tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
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


def index_of_lists(copy):
    (copy / INDEX).write_text('{"metadata": {}, "weight_map": ["a"]}')


def index_of_numbers(copy):
    (copy / INDEX).write_text('{"metadata": {}, "weight_map": {"a": 1}}')


def index_of_outside(name):
    def outside(copy):
        index = json.loads((copy / INDEX).read_text())
        file = next(iter(index["weight_map"].values()))
        placed = name.format(file=file, copy=copy)
        (copy / INDEX).write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "x": placed}}))

    return outside


def index_without_metadata(copy):
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))


def index_of_twice(copy):
    (copy / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')


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
        (break_index, "index.json is not JSON: "),
        (index_of_lists, r"index.json holds \['a'\] as weight_map; use an object"),
        (index_of_numbers, "index.json holds 1 as weight_map.a; use a valid string"),
        (index_without_metadata, "index.json lacks metadata"),
        (index_of_twice, "index.json has the name 'a' twice"),
        (index_of_outside("../damaged/{file}"), "index.json names '../damaged/.*', which is no file of that folder"),
        (index_of_outside("{copy}/{file}"), "index.json names '/.*', which is no file of that folder"),
        (index_of_outside(".."), "index.json names '..', which is no file of that folder"),
        (index_of_outside("a\\b"), "index.json names .*, which is no file of that folder"),
        (remove_config, "holds no config.json"),
        (remove_weights, "holds neither model.safetensors nor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_an_input_error(tmp_path, sharded, damage, message):
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint(damaged(sharded, tmp_path, damage))
    assert caught.value.field == "model"


def test_a_single_file_wins_over_an_index_as_in_transformers(tmp_path, sharded):
    make_model(tmp_path, "llama-3.1")
    other = make_model(tmp_path / "other", "llama-3.1", max_shard_size="20KB")
    for file in Path(other).glob("*.safetensors*"):
        if file.name != INDEX:
            tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
            save_file(tensors, tmp_path / file.name, {"format": "pt"})
    shutil.copyfile(Path(other) / INDEX, tmp_path / INDEX)
    found = Checkpoint(str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert {entry.file for entry in found.entries.values()} == {"model.safetensors"}
    assert all(torch.equal(found.read(name), loaded[name]) for name in found.entries)


def test_a_config_that_names_its_weights_is_refused(tmp_path):
    make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    with pytest.raises(InputError, match=r"^model: .*config\.json names weights of its own, .*'other\.safetensors'"):
        Checkpoint(str(tmp_path))


def test_a_cached_snapshot_is_complete_with_the_files_that_are_read(tmp_path, sharded, monkeypatch):
    import huggingface_hub

    snapshot = shutil.copytree(sharded, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    assert locate("a/b") == str(snapshot)
    next(snapshot.glob("model-*")).unlink()
    assert locate("a/b") == "hf://a/b"
    (snapshot / "model.safetensors").touch()
    assert locate("a/b") == str(snapshot)


@pytest.mark.parametrize("model", ["missing", "../missing/model", "/no/such/place"])
def test_a_missing_model_is_an_input_error(model):
    with pytest.raises(InputError, match="is no directory, no URL and no hub name"):
        Checkpoint(model)


def test_a_checkpoint_without_tokenizer_says_so(sharded):
    with pytest.raises(InputError, match="holds no tokenizer"):
        Checkpoint(sharded).tokenizer()


@pytest.mark.parametrize("family", ["llama-3.1", "opt", "bloom", "falcon"])
def test_files_of_the_model_without_its_head_are_those_of_the_model(family, tmp_path):
    """BLOOM's own have names without the prefix of the model within the causal one."""
    if family in CONFIGS:
        make_model(tmp_path / "model", family)
    else:
        make_architecture(tmp_path / "model", family, DENSE[family])
    make_tokens(tmp_path / "tokens.npy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "bare")
    (file,) = (tmp_path / "bare").glob("*.safetensors")
    prefix = f"{model.base_model_prefix}."
    tensors = load_file(file)
    assert any(name.startswith(prefix) for name in tensors)
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, file, {"format": "pt"})
    for name in ("model", "bare"):
        run(tmp_path, f"{name}-half", model=name, sparsity=0.5, eval=[str(tmp_path / "tokens.npy")])
    found = [AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-half").state_dict() for name in ("model", "bare")]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert check(str(tmp_path / "bare-half"))[0].faults == []


def test_tensors_that_an_index_leaves_out_are_read(sharded, tmp_path):
    """As transformers reads all of the files that the index lists."""
    shutil.copytree(sharded, tmp_path / "model")
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    name = next(name for name in index["weight_map"] if name.endswith("norm.weight"))
    del index["weight_map"][name]
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    assert Checkpoint(str(tmp_path / "model")).entries.keys() == Checkpoint(sharded).entries.keys()


def test_an_output_names_no_code_that_it_has_not(tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    words_tokenizer().save_pretrained(tmp_path / "model")
    make_tokens(tmp_path / "tokens.npy")
    named = {"config.json": "AutoModelForCausalLM", "tokenizer_config.json": "AutoTokenizer"}
    before = {}
    for name, kind in named.items():
        before[name] = json.loads((tmp_path / "model" / name).read_text())
        own = {"auto_map": {kind: "code.Own"}}
        (tmp_path / "model" / name).write_text(json.dumps({**before[name], **own}))
    run(tmp_path, "out", sparsity=0.5)
    for name, fields in before.items():
        assert json.loads((tmp_path / "out" / name).read_text()) == fields
    AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
