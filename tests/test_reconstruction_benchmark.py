"""The benchmark of trainings of layers: a mask that moves, and what is trained in which way."""

import pytest
import torch

from benchmarks import reconstruction
from benchmarks.reconstruction import WAYS, Way, layers_of, train, zeros
from shardprune.model.opening import open_model
from shardprune.shard.master_weights import MasterWeights
from tests.support.tiny import GROUPED, make_model


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconstruction") / "model"
    name, values = GROUPED["llama"]
    make_model(folder, "llama", configs={"llama": (name, values)})
    opened = open_model(str(folder))
    opened.skeleton.load_frame(opened.checkpoint, embedding=True, head=True)
    return opened


def sparse_layers(opened):
    layers = layers_of(opened)
    for index, layer in enumerate(layers):
        for name in opened.skeleton.family.kinds[index].projections:
            weight = layer.get_parameter(f"{name}.weight").data
            weight[weight.abs() < weight.abs().median()] = 0
    return layers


@torch.no_grad()
def test_the_smallest_weights_give_their_places_to_the_zeros_with_the_largest_gradients():
    master = MasterWeights(torch.tensor([[1.0, -0.1, 0.0, 0.0], [0.2, 0.0, -3.0, 0.0]]), on_host=False)
    gradient = torch.tensor([[9.0, 9.0, 0.1, -0.4], [9.0, 0.3, 9.0, 0.2]])
    reconstruction.move(master, gradient, share=0.5)
    assert master.mask.tolist() == [[True, False, False, True], [False, True, True, False]]
    assert master.weight.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -3.0, 0.0]]


@pytest.mark.parametrize(
    "name", ["norms, too", "attention and MLP apart", "two layers together", "masks that move, 20 %"]
)
def test_a_way_trains_what_it_says_and_keeps_the_number_of_zeros(name, opened):
    skeleton, given = opened.skeleton, WAYS[name]
    way = Way(20, given.rate, given.together, given.norms, given.apart, given.moving)
    dense, before, layers = layers_of(opened), sparse_layers(opened), sparse_layers(opened)
    tokens = torch.randint(3, skeleton.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
    train(skeleton, dense, layers, tokens, way)
    assert zeros(skeleton, layers) == zeros(skeleton, before)
    with torch.no_grad():
        embedded = skeleton.embed(tokens)
        target, old, new = (
            reconstruction.through(skeleton, dict(enumerate(model)), embedded) for model in (dense, before, layers)
        )
    assert (new - target).square().sum() < (old - target).square().sum()
    changed = {
        parameter
        for first, second in zip(before, layers, strict=True)
        for parameter, value in first.named_parameters()
        if not torch.equal(value, second.get_parameter(parameter))
    }
    projections = {f"{one}.weight" for one in skeleton.family.kinds[0].projections}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"} if way.norms else set()
    assert changed == projections | norms
    positions = [
        (layer.get_parameter(one) != 0) for model in (before, layers) for layer in model for one in sorted(projections)
    ]
    half = len(positions) // 2
    same = all(torch.equal(first, second) for first, second in zip(positions[:half], positions[half:], strict=True))
    assert same == (way.moving == 0)
