"""The skeleton runs a model layer by layer and gives what transformers gives."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.checks import check_tensors
from shardprune.model.empty_model import attention_of
from shardprune.model.families import FAMILIES
from shardprune.model.skeleton import Skeleton
from tests.support.tiny import CONFIGS, VOCABULARY, make_model


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def build(path: str, device: str = "cpu") -> tuple[Checkpoint, Skeleton]:
    checkpoint = Checkpoint(path)
    skeleton = Skeleton(checkpoint.config, device, torch.float32)
    check_tensors(skeleton, checkpoint)
    return checkpoint, skeleton


def layer_of(checkpoint: Checkpoint, skeleton: Skeleton, index: int):
    return skeleton.build_layer(index, ((name, checkpoint.read(name)) for name in skeleton.layer_tensors(index)))


@torch.no_grad()
def test_layer_by_layer_equals_the_whole_model(saved, device):
    checkpoint, skeleton = build(saved, device)
    tokens = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0)).to(device)
    skeleton.load_frame(checkpoint, embedding=True)
    hidden = skeleton.embed(tokens)
    skeleton.drop_embeddings()
    for index in range(skeleton.layers):
        layer = layer_of(checkpoint, skeleton, index)
        hidden = skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(index, *tokens.shape))
    skeleton.load_frame(checkpoint, head=True)
    logits = skeleton.logits(hidden)
    whole = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention_of(checkpoint.config))
    expected = whole.eval().to(device)(tokens).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    assert device == "cuda" or torch.equal(logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("longer", [24, 40])
def test_dynamic_rotary_embeddings_beyond_the_positions_of_the_config(tmp_path, longer):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    name, values = CONFIGS["llama"]
    dynamic = {"dynamic": (name, {**values, "max_position_embeddings": 16, "rope_parameters": rope})}
    checkpoint, skeleton = build(make_model(tmp_path, "dynamic", configs=dynamic))
    skeleton.load_frame(checkpoint, embedding=True, head=True)
    layers = [layer_of(checkpoint, skeleton, index) for index in range(skeleton.layers)]
    for length in (longer, 12):  # frequencies change for the long sequences, and return for the short ones
        tokens = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
        hidden = skeleton.embed(tokens)
        for index, layer in enumerate(layers):
            hidden = skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(index, *tokens.shape))
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
        assert torch.equal(skeleton.logits(hidden), whole(tokens).logits)


@torch.no_grad()
def test_a_skeleton_knows_every_linear_and_who_shares_an_input(saved):
    checkpoint, skeleton = build(saved)
    layer = layer_of(checkpoint, skeleton, 0)
    seen: dict[int, list[str]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _module, inputs, name=name: seen.setdefault(inputs[0].data_ptr(), []).append((name, inputs[0]))
            )
    skeleton.load_frame(checkpoint)
    hidden = torch.randn(2, 24, skeleton.config.hidden_size)
    skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(0, 2, 24))
    shared = {frozenset(name for name, _ in readers) for readers in seen.values()}
    assert shared == {frozenset(group) for group in skeleton.family.kinds[0].inputs}


def test_no_memory_for_what_is_not_loaded(saved):
    checkpoint, skeleton = build(saved)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    skeleton.load_frame(checkpoint, embedding=True, head=True)
    loaded = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    inside = {name for index in range(skeleton.layers) for name in skeleton.layer_tensors(index)}
    assert loaded == set(skeleton.tensors()) - inside
    skeleton.drop_embeddings()
    assert skeleton.model.get_input_embeddings().weight.is_meta
    assert skeleton.model.get_output_embeddings().weight.is_meta


def test_every_family_of_the_table_is_tested():
    tested = {name.removesuffix("Config").lower() for name, _ in CONFIGS.values()}
    assert tested == set(FAMILIES)


def test_a_checkpoint_that_lacks_a_tensor_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"has no tensor model\.layers\.2\.mlp\.up_proj\.weight"):
        build(str(tmp_path))


def test_weights_of_another_kind_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.weight is torch\.int8; use float32, float16 or bfloat16"):
        build(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"I8"', b'"I9"'))
    with pytest.raises(InputError, match=r"holds I9 tensors; use one of F64, F32"):
        build(str(tmp_path))


def test_fp8_weights_of_which_the_config_says_nothing_and_other_quantised_ones_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.weight is torch\.float8_e4m3fn; use float32, float16 or bfloat16"):
        build(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fbgemm_fp8"}}))
    with pytest.raises(InputError, match=r"^model: its weights are quantised"):
        build(str(tmp_path))


@pytest.mark.parametrize(
    "changed",
    [
        {"num_hidden_layers": "four"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"hidden_act": "nope"},
        {"dtype": "float99"},
        {"quantization_config": {"quant_method": "awq"}},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_an_error(tmp_path, changed):
    import json

    make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(InputError) as caught:
        build(str(tmp_path))
    assert caught.value.field == "model"
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_does_not_fit_its_config_is_an_error(tmp_path):
    import json

    make_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(InputError, match=r"is \[48, 32\]; the config implies \[40, 32\]"):
        build(str(tmp_path))
