"""Tensors that a file holds as several, one below the other."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.checks import check_tensors
from shardprune.model.skeleton import Skeleton
from tests.support.architectures import MIXED, make_architecture
from tests.support.running import run
from tests.support.tiny import load_tensors, make_tokens

WHOLE = "model.layers.0.linear_attn.conv1d.weight"
STORED = [f"model.layers.0.linear_attn.{part}_conv1d.weight" for part in "qkv"]


@pytest.fixture
def uneven(tmp_path):
    """An OLMo-Hybrid as it is published: its values are wider than its queries and keys, and so are their rows of the
    convolution, which transformers itself would write in equal parts; and that convolution, whole."""
    values = {**MIXED["olmo_hybrid"], "linear_value_head_dim": 16}
    make_architecture(tmp_path / "model", "olmo_hybrid", values)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    whole = torch.cat([tensors.pop(name) for name in STORED])
    parts = whole.split([32, 32, 64])
    tensors |= {name: part.clone() for name, part in zip(STORED, parts, strict=True)}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    make_tokens(tmp_path / "tokens.npy")
    return tmp_path, whole


def test_parts_are_read_as_one_tensor_and_written_as_they_were(uneven):
    folder, whole = uneven
    checkpoint = Checkpoint(str(folder / "model"))
    check_tensors(Skeleton(checkpoint.config, "cpu"), checkpoint)
    assert checkpoint.place(WHOLE).names == tuple(STORED)
    assert torch.equal(checkpoint.read(WHOLE), whole)
    for start, stop in ((0, 5), (100, 140), (127, 129), (0, whole.numel()), (9, 9)):
        assert torch.equal(checkpoint.read_elements(WHOLE, start, stop), whole.reshape(-1)[start:stop])
    middle = torch.empty(900, dtype=torch.uint8)
    checkpoint.stored(WHOLE).read_part(301, middle)
    assert torch.equal(middle, whole.reshape(-1).view(torch.uint8)[301:1201])

    run(folder, "out", sparsity=0.5)
    before, after = load_tensors(folder / "model"), load_tensors(folder / "out")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    assert all(torch.equal(before[name], after[name]) for name in STORED)


def test_each_part_shapes_the_identity(uneven):
    folder, _ = uneven
    first = Checkpoint(str(folder / "model")).identity()
    for name in STORED:
        file = folder / "model" / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
        assert Checkpoint(str(folder / "model")).identity() != first
        save_file(tensors, file, {"format": "pt"})
    assert Checkpoint(str(folder / "model")).identity() == first


def test_parts_in_several_files_make_one_tensor(uneven):
    folder, whole = uneven
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    files = {name: f"{1 + (name == STORED[1])}.safetensors" for name in tensors}
    for one in set(files.values()):
        own = {name: tensor for name, tensor in tensors.items() if files[name] == one}
        save_file(own, folder / "model" / one, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(str(folder / "model"))
    assert torch.equal(checkpoint.read(WHOLE), whole)
    assert checkpoint.entries[WHOLE].files == {"1.safetensors", "2.safetensors"}


def test_a_part_that_is_missing_is_named(uneven):
    folder, _ = uneven
    file = folder / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[STORED[1]]
    save_file(tensors, file, {"format": "pt"})
    checkpoint = Checkpoint(str(folder / "model"))
    with pytest.raises(InputError, match="linear_attn.conv1d.weight"):
        check_tensors(Skeleton(checkpoint.config, "cpu"), checkpoint)
