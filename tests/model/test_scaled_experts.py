"""Experts of Llama 4: each is shown the tokens that are routed to it, scaled, and adds what transformers says."""

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.experts import Part
from shardprune.model.skeleton import Skeleton, projection_weight
from tests.support.architectures import MIXTURES, make_architecture

INDEX = 2  # a layer with experts


@pytest.fixture(params=[1, 2])
def layers(request, tmp_path):
    """A layer, the same one as transformers has it, its skeleton, and experts of each token."""
    values = {**MIXTURES["llama4_text"], "num_experts_per_tok": request.param}
    checkpoint = Checkpoint(make_architecture(tmp_path, "llama4_text", values))
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    skeleton.load_frame(checkpoint)
    names = skeleton.layer_tensors(INDEX)
    built = skeleton.build_layer(INDEX, ((name, checkpoint.read(name)) for name in names))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    return built, whole.model.layers[INDEX], skeleton, request.param


@torch.no_grad()
def test_parts_see_the_scaled_tokens_that_are_routed_to_them(layers):
    built, whole, skeleton, chosen = layers
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
    given, seen = [], {}
    built.feed_forward.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].flatten(0, 1)))
    for name, part in built.named_modules():
        if isinstance(part, Part):
            part.register_forward_hook(
                lambda _part, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
    arguments = skeleton.layer_arguments(INDEX, 2, 24)
    output = skeleton.forward_layer(built, hidden, arguments)
    expected = whole(hidden, *arguments.positional, **arguments.keywords)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)

    (tokens,) = given
    best = linear(tokens, whole.feed_forward.router.weight).topk(chosen, dim=-1)
    counts = 0
    for expert in range(4):
        routed = (best.indices == expert).any(-1)
        scores = best.values[best.indices == expert].sigmoid()  # by token, each of which has it once
        inputs = tokens[routed] * scores[:, None]
        gate, up, down = (f"feed_forward.experts.{expert}.{name}_proj" for name in ("gate", "up", "down"))
        if not len(inputs):
            assert gate not in seen
            continue
        order = [int((inputs - row).abs().amax(-1).argmin()) for row in seen[gate][0]]  # first choices come first
        assert sorted(order) == list(range(len(inputs)))
        assert torch.allclose(seen[gate][0], inputs[order], rtol=1e-5, atol=1e-6)
        assert torch.equal(seen[up][0], seen[gate][0])
        neurons = silu(linear(inputs, projection_weight(built, gate))) * linear(inputs, projection_weight(built, up))
        assert torch.allclose(seen[down][0], neurons[order], rtol=1e-5, atol=1e-6)
        counts += len(inputs)
    assert counts == 48 * chosen


def test_gradients_are_those_of_transformers(layers):
    built, whole, skeleton, _ = layers
    arguments = skeleton.layer_arguments(INDEX, 2, 24)
    draw = torch.Generator().manual_seed(1)
    hidden, towards = (torch.randn(2, 24, 32, generator=draw) for _ in range(2))
    gradients = []
    for layer in (built, whole):
        own = hidden.clone().requires_grad_()
        router = layer.feed_forward.router.weight.requires_grad_()
        output = layer(own, *arguments.positional, **arguments.keywords)
        gradients.append(torch.autograd.grad((output * towards).sum(), [own, router]))
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.any()
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)
