"""Experts as linear maps of their own: the class's own code runs, and each part of an expert is a projection."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.checks import check_tensors
from shardprune.model.empty_model import attention_of
from shardprune.model.experts import Part, named_tensors
from shardprune.model.skeleton import Skeleton, projection_weight
from shardprune.model.verification import difference_layer_by_layer, small_config
from tests.support.architectures import MIXTURES, VOCABULARY, make_architecture

ROUNDING = {
    "llama4_text"
}  # whose class multiplies all tokens at once, zeros for those that are not routed to an expert


@torch.no_grad()
@pytest.mark.parametrize("model_type", MIXTURES)
def test_layer_by_layer_equals_the_whole_model(model_type, tmp_path):
    path = make_architecture(tmp_path, model_type, MIXTURES[model_type])
    checkpoint = Checkpoint(path)
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    check_tensors(skeleton, checkpoint)
    skeleton.load_frame(checkpoint, embedding=True, head=True)
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden = skeleton.embed(tokens)
    attention = attention_of(checkpoint.config)
    whole = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=attention, experts_implementation="eager"
    ).eval()
    tensors = named_tensors(whole)
    for index in range(skeleton.layers):
        layer = skeleton.build_layer(index, ((name, checkpoint.read(name)) for name in skeleton.layer_tensors(index)))
        for name in skeleton.layer_tensors(index):
            own = layer.state_dict()[name.removeprefix(f"{skeleton.family.layers}.{index}.")]
            assert torch.equal(own, tensors[name])
            assert own.dtype == tensors[name].dtype
        hidden = skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(index, *tokens.shape))
    logits, expected = skeleton.logits(hidden), whole(tokens).logits
    assert torch.equal(logits, expected) or (model_type in ROUNDING and torch.allclose(logits, expected, atol=1e-5))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_random_model_is_the_same_layer_by_layer(model_type):
    difference = difference_layer_by_layer(AutoConfig.for_model(model_type, **MIXTURES[model_type]))
    assert difference <= (1e-5 if model_type in ROUNDING else 0)


@pytest.fixture
def layer(tmp_path):
    """The first layer of a Qwen3-MoE, its skeleton, and hidden states that enter it."""
    checkpoint = Checkpoint(make_architecture(tmp_path, "qwen3_moe", MIXTURES["qwen3_moe"]))
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    skeleton.load_frame(checkpoint)
    names = skeleton.layer_tensors(0)
    built = skeleton.build_layer(0, ((name, checkpoint.read(name)) for name in names))
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1))
    return skeleton, built, hidden


@torch.no_grad()
def routed(skeleton, layer, hidden):
    """The tokens [count, hidden] that each expert gets, as first choice or as second, in a plain formulation."""
    tokens: list[torch.Tensor] = []
    hook = layer.mlp.register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0].flatten(0, 1)))
    skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(0, *hidden.shape[:2]))
    hook.remove()
    chosen = linear(tokens[0], layer.mlp.gate.weight).topk(2, dim=-1).indices
    return [torch.cat([tokens[0][choice == expert] for choice in chosen.t()]) for expert in range(6)]


@torch.no_grad()
def test_a_part_is_called_with_the_tokens_that_are_routed_to_its_expert(layer):
    skeleton, built, hidden = layer
    expected, seen = routed(skeleton, built, hidden), {}
    for name, part in built.named_modules():
        if isinstance(part, Part):
            part.register_forward_hook(
                lambda _part, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
    skeleton.forward_layer(built, hidden, skeleton.layer_arguments(0, *hidden.shape[:2]))
    experts = [expert for expert, tokens in enumerate(expected) if len(tokens)]
    assert {name.split(".")[2] for name in seen} == {str(expert) for expert in experts}
    for expert in experts:
        gate, up, down = (f"mlp.experts.{expert}.{part}" for part in ("gate_proj", "up_proj", "down_proj"))
        assert torch.equal(seen[gate][0], expected[expert])
        assert torch.equal(seen[up][0], expected[expert])
        for name in (gate, up, down):
            inputs, output = seen[name]
            assert torch.allclose(output, linear(inputs, projection_weight(built, name)), atol=1e-6)
        neurons = nn.functional.silu(seen[gate][1]) * seen[up][1]
        assert torch.equal(seen[down][0], neurons)


@torch.no_grad()
def test_pruning_a_part_changes_what_the_layer_computes(layer):
    skeleton, built, hidden = layer
    arguments = skeleton.layer_arguments(0, *hidden.shape[:2])
    before = skeleton.forward_layer(built, hidden, arguments)
    for name in skeleton.family.kinds[0].projections:
        if name.endswith("down_proj"):
            projection_weight(built, name).zero_()
    after = skeleton.forward_layer(built, hidden, arguments)
    assert not torch.equal(before, after)
    built.mlp = nn.Module()
    built.mlp.forward = torch.zeros_like
    assert torch.equal(after, skeleton.forward_layer(built, hidden, arguments))


def test_weights_that_stand_in_for_those_of_parts_are_used_and_have_gradients(layer):
    skeleton, built, hidden = layer
    arguments = skeleton.layer_arguments(0, *hidden.shape[:2])
    names = [name for name in skeleton.family.kinds[0].projections if "experts" in name]
    others = {name: projection_weight(built, name).detach() * 0.5 for name in names}
    leaves = {f"{name}.weight": weight.clone().requires_grad_() for name, weight in others.items()}
    output = torch.func.functional_call(built, leaves, (hidden,), arguments.keywords)
    output.square().sum().backward()
    reached = [expert for expert, tokens in enumerate(routed(skeleton, built, hidden)) if len(tokens)]
    for name in names:
        gradient = leaves[f"{name}.weight"].grad
        assert (gradient is not None and bool(gradient.any())) == (int(name.split(".")[2]) in reached)
    with torch.no_grad():
        for name in names:
            projection_weight(built, name).copy_(others[name])
        assert torch.equal(skeleton.forward_layer(built, hidden, arguments), output)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "nemotron_h"])
def test_gradients_reach_the_outputs_of_parts(model_type, tmp_path):
    """With Z = X W^T, the gradient by W is that by Z, transposed, times X."""
    checkpoint = Checkpoint(make_architecture(tmp_path, model_type, MIXTURES[model_type]))
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    skeleton.load_frame(checkpoint)
    index = next(place for place, kind in enumerate(skeleton.family.kinds) if kind.mixtures)
    built = skeleton.build_layer(index, ((name, checkpoint.read(name)) for name in skeleton.layer_tensors(index)))
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    arguments = skeleton.layer_arguments(index, *hidden.shape[:2])
    seen = {}
    for name, part in built.named_modules():
        if isinstance(part, Part):
            part.register_forward_hook(
                lambda _part, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
    plain = skeleton.forward_layer(built, hidden, arguments)
    gradients = torch.autograd.grad(plain.square().sum(), [output for _, output in seen.values()])
    known = {name: gradient.t() @ inputs for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True)}
    leaves = {f"{name}.weight": projection_weight(built, name).detach().clone().requires_grad_() for name in seen}
    output = torch.func.functional_call(built, leaves, (hidden,), arguments.keywords)
    assert torch.equal(output, plain)
    output.square().sum().backward()
    assert len(known) > 2
    for name, gradient in known.items():
        assert gradient.any()
        assert torch.allclose(leaves[f"{name}.weight"].grad, gradient, rtol=1e-4, atol=1e-5), name


@torch.no_grad()
def test_a_copy_of_a_layer_has_weights_of_its_own(layer):
    skeleton, built, hidden = layer
    arguments = skeleton.layer_arguments(0, *hidden.shape[:2])
    twin = copy.deepcopy(built)
    before = skeleton.forward_layer(built, hidden, arguments)
    projection_weight(twin, "mlp.experts.0.down_proj").zero_()
    projection_weight(twin, "mlp.experts.1.gate_proj").zero_()
    assert torch.equal(skeleton.forward_layer(built, hidden, arguments), before)
    assert not torch.equal(skeleton.forward_layer(twin, hidden, arguments), before)


def test_other_uses_of_an_experts_matrix_are_not_passed_over(layer):
    _, built, _ = layer
    with pytest.raises(NotImplementedError, match="used in t"):
        built.mlp.experts.down_proj[0].t()


def test_a_small_model_of_a_class_has_experts():
    values = {**MIXTURES["deepseek_v3"], "num_hidden_layers": 6, "first_k_dense_replace": 3}
    kinds = Skeleton(small_config(AutoConfig.for_model("deepseek_v3", **values)), "cpu").family.kinds
    assert [bool(kind.mixtures) for kind in kinds] == [False, True]


def test_names_on_disk_are_those_of_the_parts(tmp_path):
    checkpoint = Checkpoint(make_architecture(tmp_path, "mixtral", MIXTURES["mixtral"]))
    own, stored = "model.layers.1.mlp.experts.3", "model.layers.1.block_sparse_moe.experts.3"
    for part, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        assert checkpoint.stored_name(f"{own}.{part}.weight") == f"{stored}.{name}.weight"


def test_routers_and_gates_stay_dense():
    kinds = Skeleton(AutoConfig.for_model("qwen2_moe", **MIXTURES["qwen2_moe"]), "cpu").family.kinds
    assert kinds[0].kept == {
        "a router chooses experts": ("mlp.gate.weight",),
        "the gate of shared experts": ("mlp.shared_expert_gate.weight",),
    }
    shared = "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"
    assert {shared, ("mlp.shared_expert.down_proj",)} < set(kinds[0].inputs)
