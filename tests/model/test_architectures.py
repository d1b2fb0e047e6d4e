"""Architectures without a row in the table: what is derived of them, and why others are refused."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.checks import check_tensors
from shardprune.model.empty_model import attention_of, empty_model, persistent_buffers
from shardprune.model.families import FAMILIES
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import CHECKED
from tests.support.architectures import (
    CARRYING,
    DENSE,
    MIXED,
    MIXTURES,
    REFUSED,
    VOCABULARY,
    make_architecture,
)
from tests.support.towers import TOWERS

Q, K, V = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"


@torch.no_grad()
@pytest.mark.parametrize("model_type", [*DENSE, *MIXED])
def test_layer_by_layer_equals_the_whole_model(model_type, tmp_path):
    path = make_architecture(tmp_path, model_type, {**DENSE, **MIXED}[model_type])
    checkpoint = Checkpoint(path)
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    check_tensors(skeleton, checkpoint)
    skeleton.load_frame(checkpoint, embedding=True, head=True)
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    hidden = skeleton.embed(tokens)
    whole = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention_of(checkpoint.config)).eval()
    for index in range(skeleton.layers):
        names = skeleton.layer_tensors(index)
        layer = skeleton.build_layer(index, ((name, checkpoint.read(name)) for name in names))
        own = whole.get_submodule(f"{skeleton.family.layers}.{index}").state_dict()
        assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
            name: tensor.dtype for name, tensor in own.items()
        }
        kind = skeleton.family.kinds[index]
        kept = {name.removesuffix(".weight") for names in kind.kept.values() for name in names}
        matrices = {name.removesuffix(".weight") for name, parameter in layer.named_parameters() if parameter.dim() > 1}
        assert matrices == set(kind.projections) | kept
        assert not set(kind.projections) & kept
        assert (not kept) or model_type in MIXED
        hidden = skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(index, *tokens.shape))
    assert torch.equal(skeleton.logits(hidden), whole(tokens).logits)


def test_what_shares_an_input_in_parallel_blocks_is_one_group():
    skeleton = Skeleton(AutoConfig.for_model("cohere2", **DENSE["cohere2"]), "cpu")
    gate, up, down, out = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"
    assert skeleton.family.kinds[0].inputs == ((Q, K, V, gate, up), (out,), (down,))
    assert skeleton.family.kinds[0].blocks == {"attention": (Q, K, V, out), "mlp": (gate, up, down)}


def test_persistent_buffers_have_the_values_that_are_stored(tmp_path):
    checkpoint = Checkpoint(make_architecture(tmp_path, "apertus", DENSE["apertus"]))
    skeleton = Skeleton(checkpoint.config, "cpu", torch.float32)
    name = "model.layers.1.mlp.act_fn.beta"
    assert skeleton.layer_tensors(1)[name] == ()
    layer = skeleton.build_layer(1, ((one, checkpoint.read(one)) for one in skeleton.layer_tensors(1)))
    found, initial = persistent_buffers(layer)["mlp.act_fn.beta"], persistent_buffers(skeleton.model)[name]
    assert torch.equal(found, checkpoint.read(name).to(initial.dtype))
    assert not torch.equal(found, initial)


def test_weights_that_a_class_keeps_in_float32_are_float32(monkeypatch):
    config = AutoConfig.for_model("olmo2", **DENSE["olmo2"])
    model_class = type(Skeleton(config, "cpu").model)
    monkeypatch.setattr(model_class, "_keep_in_fp32_modules_strict", ["q_norm"])
    skeleton = Skeleton(config, "cpu", torch.bfloat16)
    tensors = {name: torch.ones(shape) for name, shape in skeleton.layer_tensors(0).items()}
    dtypes = {name: tensor.dtype for name, tensor in skeleton.build_layer(0, tensors.items()).named_parameters()}
    assert dtypes.pop("self_attn.q_norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_names_on_disk_are_mapped_as_transformers_maps_them(tmp_path):
    checkpoint = Checkpoint(make_architecture(tmp_path, "gpt_neox", DENSE["gpt_neox"]))
    assert checkpoint.stored_name("lm_head.weight") == "embed_out.weight"


@pytest.mark.parametrize("model_type", REFUSED)
def test_others_are_refused_with_the_reason(model_type):
    values, reason = REFUSED[model_type]
    with pytest.raises(InputError, match=reason) as caught:
        Skeleton(AutoConfig.for_model(model_type, **values), "cpu")
    assert caught.value.field == "model"
    assert not re.search("\n", str(caught.value))


def test_checked_classes_are_those_that_the_tests_run():
    parts = {TOWERS[name]["text_config"]["model_type"] for name in TOWERS}
    assert {*CARRYING, *DENSE, *MIXED, *MIXTURES, *FAMILIES} | parts == CHECKED


@pytest.mark.parametrize("model_type", ["llama4_text", "longcat_flash"])
def test_experts_that_no_memory_holds_are_built_without_values(model_type):
    """One class fills them with zeros, and the other does not."""
    values = {**MIXTURES[model_type], "hidden_size": 8192, "num_local_experts": 2**20, "n_routed_experts": 2**20}
    model = empty_model(AutoConfig.for_model(model_type, **values), torch.float32, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert sum(parameter.numel() for parameter in model.parameters()) > 2**39
