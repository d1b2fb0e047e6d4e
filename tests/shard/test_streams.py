"""Copies beside the computation: waves on the host, layers from files, files from layers; same values, no waiting.

On the simulated GPU all is done in the order of the program: it counts who waits, and copies that pinned memory would
have spared. On a real one a missing wait between streams is a wrong value here.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from shardprune.errors import StorageError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.shard.device_reader import READERS, DeviceReader
from shardprune.shard.layers import Layers
from shardprune.shard.streams import to_device, to_host
from shardprune.shard.waves import Activations
from shardprune.shard.write_behind import WriteBehind
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import StoredTensor, read_header, write_tensors
from tests.support import simulated_cuda as simulation
from tests.support.fp8 import make_fp8
from tests.support.tiny import load_tensors, make_model

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Place(NamedTuple):
    """A device, and what is counted on it."""

    device: torch.device
    counts: object | None


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("simulated", marks=simulation.needs_simulated_cuda),
        pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu]),
    ]
)
def place(request):
    with simulation.simulated_cuda() if request.param == "simulated" else nullcontext() as gpu:
        name = "cpu" if request.param == "cpu" else "cuda"
        yield Place(torch.device(name), gpu.counts if gpu else None)


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(simulation.to_cpu(found).cpu(), expected)


def image(hidden: torch.Tensor) -> torch.Tensor:
    """What a layer makes of a wave; on a GPU it takes longer than a copy of the next one."""
    for _ in range(30):
        hidden = hidden @ torch.eye(hidden.shape[-1], device=hidden.device, dtype=hidden.dtype) * 2
    return hidden * 2.0**-30 + 1


@pytest.mark.parametrize("kept", ["device", "host"])
def test_waves_pass_through_layers_as_they_would_one_by_one(place, kept):
    size = (2, 64, 256) if place.device.type == "cuda" and place.counts is None else (2, 3, 8)
    held = Activations(place.device, kept)
    expected = {}
    for wave in (0, 2, 4, 6):
        hidden = torch.randint(-8, 8, size).float()
        expected[wave] = hidden.clone()
        held.put("a", wave, hidden)
        hidden.zero_()
    for layer in range(3):
        for wave in expected:  # a pass that looks, and one that replaces
            assert equal(held.get("a", wave), expected[wave])
        for wave in expected:
            held.replace("a", wave, image(held.get("a", wave)))
            expected[wave] = expected[wave] + 1
        if layer == 1:
            held.fork("a", "b")
            frozen = {wave: tensor.clone() for wave, tensor in expected.items()}
    held.replace("a", 2, image(held.get("a", 0)))  # while the next one, 2, is on its way
    expected[2] = expected[0] + 1
    for wave in (2, 6, 0, 4):
        assert equal(held.get("a", wave), expected[wave])
    for wave in expected:
        found = held.take("a", wave)
        assert found.device.type == (place.device.type if kept == "device" else "cpu")
        assert found.is_contiguous()
        assert equal(found, expected[wave])
        assert equal(held.get("b", wave), frozen[wave])
    held.drop("b")
    with pytest.raises(KeyError):
        held.get("b", 0)


@pytest.mark.parametrize("kept", ["device", "host"])
def test_a_wave_that_comes_from_the_device_is_kept_as_it_was(place, kept):
    held = Activations(place.device, kept)
    hidden = to_device(torch.arange(24.0).reshape(2, 3, 4), place.device).transpose(1, 2)
    held.put("a", 0, hidden)
    assert equal(held.take("a", 0), torch.arange(24.0).reshape(2, 3, 4).transpose(1, 2))


@simulation.needs_simulated_cuda
def test_a_pass_over_waves_on_the_host_waits_for_nothing_and_copies_each_once_each_way():
    with simulation.simulated_cuda() as gpu:
        held = Activations(torch.device("cuda"), "host")
        for wave in range(5):
            held.put("a", wave, torch.ones(2, 3, 8))
        gpu.counts.clear()
        for wave in range(5):
            held.replace("a", wave, held.get("a", wave) + 1)
        total, size = gpu.counts.total(), 4 * 2 * 3 * 8
        assert (total.syncs, total.pageable, total.to_device, total.to_host) == (0, 0, 5 * size, 5 * size)


@pytest.fixture
def stored(tmp_path):
    """Tensors in a file, of sizes around those of a buffer of 64 bytes."""
    shapes = {"one": (3,), "wide": (5, 7), "just": (16,), "none": (0, 4), "many": (13, 31)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["half"] = torch.randn(9, 9).bfloat16()
    folder = Folder(str(tmp_path), "out")
    write_tensors(folder, "tensors.safetensors", tensors, {})
    entries, _ = read_header(folder, "tensors.safetensors")
    return tensors, {name: StoredTensor(folder, entries[name]) for name in tensors}


def test_tensors_come_to_the_device_through_few_buffers(place, stored):
    if place.device.type == "cpu":
        pytest.skip("a CPU reads a tensor into its place")
    tensors, places = stored
    reader = DeviceReader(place.device, chunk=64)
    for _ in range(2):
        if place.counts:
            place.counts.clear()
        found = dict(reader.read(places))
        assert [*found] == [*tensors]
        assert all(tensor.is_cuda and equal(tensor, tensors[name]) for name, tensor in found.items())
        if place.counts:
            assert place.counts.total().pageable == 0
            assert place.counts.total().to_device == sum(tensor.nbytes for tensor in tensors.values())


def test_fp8_weights_come_as_they_are_stored_and_are_multiplied_on_the_device(place, tmp_path):
    if place.device.type == "cpu":
        pytest.skip("a CPU reads a tensor into its place")
    fp8, plain = make_fp8(Path(make_model(tmp_path / "model")), block=(12, 20))
    checkpoint, elsewhere, products = Checkpoint(fp8), Checkpoint(fp8), load_tensors(plain)
    found = dict(DeviceReader(place.device, chunk=64).read({name: checkpoint.stored(name) for name in products}))
    assert [*found] == [*products]
    assert all(tensor.is_cuda and equal(tensor, products[name]) for name, tensor in found.items())
    if place.counts:
        assert place.counts.total().to_device == sum(tensor.nbytes for tensor in load_tensors(fp8).values())
    for name in products:
        elsewhere.read(name)
    assert checkpoint.source.digests == elsewhere.source.digests


def test_a_file_that_ends_early_leaves_the_buffers_to_the_next_one(place, stored, tmp_path):
    if place.device.type == "cpu":
        pytest.skip("a CPU reads a tensor into its place")
    tensors, places = stored
    reader = DeviceReader(place.device, chunk=64)
    whole = (tmp_path / "tensors.safetensors").read_bytes()
    (tmp_path / "tensors.safetensors").write_bytes(whole[:-200])
    with pytest.raises(StorageError):
        dict(reader.read(places))
    (tmp_path / "tensors.safetensors").write_bytes(whole)
    found = dict(reader.read(places))
    assert len(reader._ring) == READERS
    assert all(equal(tensor, tensors[name]) for name, tensor in found.items())


def test_layers_are_on_the_device_when_they_are_used(place, tmp_path):
    checkpoint = Checkpoint(make_model(tmp_path / "model"))
    skeleton = Skeleton(checkpoint.config, place.device, torch.float32)
    layers = Layers(skeleton, checkpoint, None, range(4), set(), stream=True)
    for _ in range(2):
        for index in range(4):
            layer = layers.get(index, "dense")
            prefix = f"{skeleton.family.layers}.{index}."
            for name, parameter in layer.named_parameters():
                assert parameter.device.type == place.device.type
                assert equal(parameter * 1, checkpoint.read(prefix + name))
    layers.release()


def test_a_layer_may_go_as_soon_as_its_file_has_begun(place):
    behind = WriteBehind(place.device)
    size = (512, 512) if place.device.type == "cuda" and place.counts is None else (8, 8)
    source = torch.randn(size)
    weight = to_device(source, place.device)
    for _ in range(20):
        weight = weight * 2
    for _ in range(20):
        weight = weight / 2
    if place.counts:
        place.counts.clear()
    found = []
    behind.begin(0, {"w": weight}, lambda tensor: found.append(tensor("w").clone()) or 1)
    if place.counts:
        assert (place.counts.total().pageable, place.counts.total().to_host) == (0, weight.nbytes)
    del weight
    _other = torch.zeros(size, device=place.device)  # where it was, perhaps
    assert behind.wait(0) == 1
    assert equal(found[0], source)
    behind.close()


def test_what_travels_is_on_the_cpu_in_one_piece(place):
    tensor = to_device(torch.arange(6.0).reshape(2, 3), place.device).T
    assert to_host(tensor).is_contiguous()
    assert equal(to_host(tensor), torch.arange(6.0).reshape(2, 3).T)
