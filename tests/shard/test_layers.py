"""How many layers a worker has in memory, and which version of each."""

import gc
import weakref

import pytest
import torch

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton, projection_weight
from shardprune.shard.layers import Layers
from shardprune.shard.waves import Activations
from shardprune.storage.journal import Journal
from shardprune.storage.records import LayerRecord
from tests.support.tiny import make_model


@pytest.fixture
def build(tmp_path):
    """Layers 0 to 3 of a tiny model, and weak references to every module that was made for them."""
    make_model(tmp_path / "model")

    def make(stream: bool, finished: tuple[int, ...] = ()):
        checkpoint = Checkpoint(str(tmp_path / "model"))
        skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
        journal = Journal(str(tmp_path / "out"), "print", skeleton.layers)
        made: list[weakref.ref] = []
        build_layer = skeleton.build_layer

        def watched(index, tensors):
            layer = build_layer(index, tensors)
            made.append(weakref.ref(layer))
            return layer

        skeleton.build_layer = watched  # type: ignore[method-assign]
        for index in finished:
            shapes = {name: (torch.float32, shape) for name, shape in skeleton.layer_tensors(index).items()}
            journal.write_layer(shapes, lambda name: checkpoint.read(name) * 0, LayerRecord(index))
        return Layers(skeleton, checkpoint, journal, range(4), set(finished), stream), made

    return make


def alive(made: list[weakref.ref]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in made)


def test_streamed_layers_are_never_more_than_two(build):
    layers, made = build(stream=True)
    for _ in range(2):
        for index in range(4):
            layers.get(index, "dense")
            assert layers.get(index, "dense") is layers.get(index, "dense")
            assert alive(made) <= 2
    assert len(made) == 8  # each read once a pass
    layers.release()
    assert alive(made) == 0


def test_resident_layers_are_read_once(build):
    layers, made = build(stream=False)
    for _ in range(2):
        for index in range(4):
            layers.get(index, "dense")
    assert len(made) == alive(made) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_the_latest_version_is_the_finished_one(build, stream):
    layers, _ = build(stream, finished=(1, 2))
    assert [bool(projection_weight(layers.get(i, "latest"), "mlp.up_proj").any()) for i in range(4)] == [
        True,
        False,
        False,
        True,
    ]
    assert all(bool(projection_weight(layers.get(i, "dense"), "mlp.up_proj").any()) for i in range(4))


def test_kept_waves_own_their_memory():
    kept = Activations(torch.device("cpu"), "host")
    hidden = torch.ones(2, 3, 4)
    kept.put("a", 0, hidden)
    kept.fork("a", "b")
    hidden.zero_()
    kept.replace("a", 0, torch.full((2, 3, 4), 5.0))
    assert kept.get("a", 0).eq(5).all()
    assert kept.get("b", 0).eq(1).all()
    assert kept.take("a", 0).eq(5).all()
    kept.drop("b")
    with pytest.raises(KeyError):
        kept.get("b", 0)
