"""Sparse files: mask and values against a plain formulation, and files that come back to the bit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shardprune.errors import InputError
from shardprune.storage.bitmask import joined, pays, split
from shardprune.storage.byte_planes import compress, decompress
from shardprune.storage.folder import Folder
from shardprune.storage.malformed import Malformed
from shardprune.storage.safetensors_file import DTYPES
from shardprune.storage.sparse_file import KEY, SparseFile, belongs, write_sparse


def sparse_tensor(dtype, shape=(6, 11), share=0.5, seed=0):
    """Elements of all bits, of which a share is zero, with a negative zero and what is no number among them."""
    draw = np.random.default_rng(seed)
    count = int(np.prod(shape))
    content = draw.integers(0, 2 if dtype == torch.bool else 256, (count, dtype.itemsize)).astype(np.uint8)
    content[draw.random(count) < share] = 0
    tensor = torch.from_numpy(content.reshape(-1)).view(dtype).reshape(shape)
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        tensor.view(-1)[0], tensor.view(-1)[1] = -0.0, float("nan")
    return tensor


def same(one, other):
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", DTYPES)
def test_mask_and_values_are_those_of_a_plain_loop(name):
    tensor = sparse_tensor(DTYPES[name])
    mask, values = split(tensor)
    raw = bytes(tensor.view(-1).view(torch.uint8).tolist())
    size = tensor.dtype.itemsize
    elements = [raw[at : at + size] for at in range(0, len(raw), size)]
    kept = [element for element in elements if any(element)]
    bits = [sum(any(element) << at for at, element in enumerate(elements[n : n + 8])) for n in range(0, 66, 8)]
    assert bits == mask.tolist()
    assert b"".join(kept) == bytes(values.view(torch.uint8).tolist())
    assert same(joined(mask, values, tuple(tensor.shape)), tensor)
    assert same(decompress(compress(tensor), tensor.numel(), tensor.dtype).reshape(tensor.shape), tensor)


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (8,), (9,), (3, 5, 7)])
def test_all_shapes(shape):
    tensor = sparse_tensor(torch.float32, shape, share=0.9) if np.prod(shape) > 1 else torch.zeros(shape)
    assert same(joined(*split(tensor), shape), tensor)
    assert same(decompress(compress(tensor), tensor.numel(), tensor.dtype).reshape(shape), tensor)


def test_it_pays_from_one_zero_in_sixteen_bits_on():
    assert not pays(1600, 1500, 2)
    assert pays(1600, 1499, 2)
    assert pays(1600, 800, 2)


@pytest.fixture(params=["none", "zstd"])
def written(request, tmp_path):
    """A file of the safetensors library, and its sparse one."""
    tensors = {
        "half": sparse_tensor(torch.bfloat16, (64, 96)),
        "dense": sparse_tensor(torch.bfloat16, (5, 3), share=0.0),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "zeros": torch.zeros(40, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "kept"})
    folder = Folder(str(tmp_path), "model")
    write_sparse(folder, "a.safetensors", folder, "b.safetensors", "print", request.param)
    return folder, tensors


def test_the_file_comes_back_to_the_byte(written, tmp_path):
    folder, tensors = written
    file = SparseFile.open(folder, "b.safetensors")
    assert {name: same(file.tensor(name), tensors[name]) for name in tensors} == dict.fromkeys(tensors, True)
    file.restore(folder, "c.safetensors")
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert belongs(folder, "b.safetensors", "print")
    assert not belongs(folder, "b.safetensors", "other")
    assert not belongs(folder, "a.safetensors", "print")
    assert not belongs(folder, "nowhere.safetensors", "print")


def test_dense_tensors_are_what_any_reader_sees(tmp_path):
    folder = Folder(str(tmp_path), "model")
    save_file({"x": torch.ones(3), "y": torch.eye(9)}, tmp_path / "a.safetensors")
    write_sparse(folder, "a.safetensors", folder, "b.safetensors", "print", "none")
    found = load_file(tmp_path / "b.safetensors")
    assert found.keys() == {":header", "x", "y:mask", "y:values"}
    assert found["y:values"].tolist() == [1.0] * 9
    assert len(found["y:mask"]) == 11


def rewritten(path, change):
    """Change the tensors and the record of a sparse file."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata[KEY])
    change(tensors, record)
    save_file(tensors, path, {**metadata, KEY: json.dumps(record)})


def _flip(tensors, _):
    tensors[next(name for name in tensors if name.startswith("half:values"))].view(torch.uint8)[70] ^= 4


DAMAGES = {
    "a bit": _flip,
    "a part less": lambda tensors, _: tensors.pop("half:mask"),
    "a shorter mask": lambda tensors, _: tensors.update({"half:mask": tensors["half:mask"][:-3].clone()}),
    "another shape": lambda _, record: record["tensors"]["half"].update(shape=[64, 95]),
    "more values": lambda _, record: record["tensors"]["half"].update(values=4000),
    "another dtype": lambda _, record: record["tensors"]["half"].update(dtype="F32"),
    "no dtype": lambda _, record: record["tensors"]["half"].update(dtype="F12"),
    "a size that no memory has": lambda _, record: record["tensors"]["half"].update(shape=[2**40, 2**40]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_found_before_anything_is_written(damage, written, tmp_path):
    folder, _ = written
    rewritten(tmp_path / "b.safetensors", DAMAGES[damage])
    with pytest.raises(InputError, match=r"model: .*b\.safetensors is damaged: (it lacks )?'half(:|' )"):
        SparseFile.open(folder, "b.safetensors").restore(folder, "c.safetensors")
    assert sorted(folder.names()) == ["a.safetensors", "b.safetensors"]


def test_a_record_that_is_none(written, tmp_path):
    folder, _ = written
    rewritten(tmp_path / "b.safetensors", lambda _, record: record.update(compression="gzip"))
    with pytest.raises(InputError, match=r"is damaged: its record holds 'gzip' as compression"):
        SparseFile.open(folder, "b.safetensors")
    with pytest.raises(InputError, match="is no sparse file"):
        SparseFile.open(folder, "a.safetensors")


def test_masks_that_say_too_much():
    mask, values = split(torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(Malformed, match="places for 3"):
        joined(mask | 16, values, (3,))
    with pytest.raises(Malformed, match="mask of 1 bytes"):
        joined(mask, values, (30,))
