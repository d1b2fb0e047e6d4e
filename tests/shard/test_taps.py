"""Partial passes through a layer, and what output projections give to the residual stream, for every family."""

import pytest
import torch

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton, projection_weight
from shardprune.shard.taps import run_with, tap
from tests.support.tiny import CONFIGS, make_model


@pytest.fixture(scope="module", params=CONFIGS)
def built(request, tmp_path_factory):
    checkpoint = Checkpoint(make_model(tmp_path_factory.mktemp(request.param), request.param))
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    skeleton.load_frame(checkpoint)
    tensors = ((name, checkpoint.read(name)) for name in skeleton.layer_tensors(1))
    width = checkpoint.config.hidden_size
    hidden = torch.randn(3, 24, width, generator=torch.Generator().manual_seed(0))
    return skeleton, skeleton.build_layer(1, tensors), hidden, skeleton.layer_arguments(1, 3, 24)


@torch.no_grad()
def test_the_stream_gets_what_output_projections_give_where_the_family_says_so(built):
    skeleton, layer, hidden, arguments = built
    outputs = skeleton.family.kinds[0].outputs
    taps = tap(layer, {}, hidden, arguments, outputs[-1], outputs, to_the_end=True)
    assert torch.equal(taps.end, skeleton.forward_layer(layer, hidden, arguments))
    added = hidden + taps.outputs[0] + taps.outputs[1]
    assert torch.allclose(added, taps.end, atol=1e-4) == skeleton.adds_outputs


@torch.no_grad()
def test_a_pass_ends_where_nothing_more_is_wanted(built):
    skeleton, layer, hidden, arguments = built
    kind = skeleton.family.kinds[0]
    seen = {}
    for name in kind.projections:
        layer.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    whole = skeleton.forward_layer(layer, hidden, arguments)
    expected = dict(seen)
    for place, reader in enumerate(kind.input_names):
        outputs = [name for name in kind.outputs if name in sum(kind.inputs[: place + 1], ())]
        seen.clear()
        taps = tap(layer, {}, hidden, arguments, reader, outputs, to_the_end=False)
        assert taps.end is None
        assert torch.equal(taps.inputs, expected[reader][0])
        assert all(
            torch.equal(found.reshape(hidden.shape), expected[name][1].reshape(hidden.shape))
            for found, name in zip(taps.outputs, outputs, strict=True)
        )
        done = {name for group in kind.inputs[:place] for name in group} | ({reader} & {*outputs})
        assert seen.keys() == done
    assert torch.equal(skeleton.forward_layer(layer, hidden, arguments), whole)  # hooks are gone


@torch.no_grad()
def test_given_weights_take_the_place_of_the_layers_own(built):
    skeleton, layer, hidden, arguments = built
    before = skeleton.forward_layer(layer, hidden, arguments)
    given = {name: projection_weight(layer, name) * 2 for name in skeleton.family.kinds[0].projections}
    found = run_with(layer, given, hidden, arguments)
    assert torch.equal(skeleton.forward_layer(layer, hidden, arguments), before)
    for name, weight in given.items():
        projection_weight(layer, name).copy_(weight)
    assert torch.equal(found, skeleton.forward_layer(layer, hidden, arguments))
    assert not torch.equal(found, before)
