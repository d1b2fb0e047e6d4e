"""FP8 weights as they are read, against products with expanded scales and transformers' own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.evaluation.latency import loading_of
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.experts import named_tensors
from shardprune.model.fp8 import Fp8Weights, QuantisationConfig
from shardprune.storage.safetensors_file import Entry
from shardprune.storage.scaled_tensors import dequantised
from shardprune.storage.stacks import Layout, Place, Slice
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.fp8 import expanded, make_fp8
from tests.support.tiny import load_tensors, make_model


@pytest.mark.parametrize("block", [(12, 20), (16, 16), (1, 48), (64, 64), (1, 1)], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_a_weight_is_multiplied_with_the_scales_of_its_blocks(block, scale_dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, 48).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-50 // block[0]), -(-48 // block[1])).to(scale_dtype)
    plain = weight.float() * expanded(scales, block, weight.shape)
    assert torch.equal(dequantised(weight, scales, block, torch.float32), plain)
    assert torch.equal(dequantised(weight, scales, block, torch.bfloat16), plain.bfloat16())
    assert torch.equal(dequantised(weight[13:31], scales, block, torch.float32, first=13), plain[13:31])


def test_scales_of_uint8_are_exponents():
    weight = torch.ones(2, 2).to(torch.float8_e4m3fn)
    scales = torch.tensor([[127, 128], [126, 120]], dtype=torch.uint8)
    expected = torch.tensor([[1.0, 2.0], [0.5, 2.0**-7]])
    assert torch.equal(dequantised(weight, scales, (1, 1), torch.float32), expected)


NAMES = {
    "scale": lambda weight: weight.replace(".weight", ".scale"),
    "qscale_weight": lambda weight: weight.replace(".weight", ".qscale_weight"),
    "weight_scale_inv": "{}_scale_inv".format,
}


@pytest.mark.parametrize(
    ("block", "names"), [((12, 20), "weight_scale_inv"), (None, "qscale_weight"), ((16, 16), "scale")], ids=str
)
def test_a_checkpoint_reads_products_whole_and_in_part(tmp_path, block, names):
    make_model(tmp_path / "model", "qwen3")
    fp8, plain = make_fp8(tmp_path / "model", block=block, scales_name=NAMES[names])
    checkpoint, expected = Checkpoint(fp8), load_tensors(plain)
    assert checkpoint.entries.keys() == expected.keys()
    assert not hasattr(checkpoint.config, "quantization_config")
    for name, tensor in expected.items():
        entry = checkpoint.entries[name]
        assert (entry.dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.read(name), tensor)
        some = tensor.numel() - 2
        assert torch.equal(checkpoint.read_elements(name, 3, some), tensor.reshape(-1)[3:some])
        part = torch.empty(2 * some - 3, dtype=torch.uint8)
        checkpoint.stored(name).read_part(3, part)
        assert torch.equal(part, tensor.reshape(-1).view(torch.uint8)[3 : 2 * some])


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "minimax_m2"])
def test_products_are_those_of_transformers(tmp_path, model_type):
    make_architecture(tmp_path / "model", model_type, MIXTURES[model_type])
    fp8, _ = make_fp8(tmp_path / "model", block=(4, 4))
    checkpoint = Checkpoint(fp8)
    model = AutoModelForCausalLM.from_pretrained(
        fp8, dtype="auto", experts_implementation="eager", **loading_of(checkpoint)
    )
    own = named_tensors(model)
    assert checkpoint.entries.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(checkpoint.read(name).to(tensor.dtype), tensor), name


def test_the_dtype_of_the_products_is_the_configs_or_the_one_that_is_given(tmp_path):
    make_model(tmp_path / "model")
    fp8, _ = make_fp8(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    assert Checkpoint(fp8).read(name).dtype == torch.bfloat16
    assert Checkpoint(fp8, dtype=torch.float32).read(name).dtype == torch.float32
    assert Checkpoint(fp8).identity() != Checkpoint(fp8, dtype=torch.float32).identity()


def test_scales_belong_to_the_identity_and_are_watched(tmp_path):
    make_model(tmp_path / "model")
    fp8, _ = make_fp8(tmp_path / "model")
    name = "model.layers.0.mlp.up_proj.weight"
    before = Checkpoint(fp8)
    identity = before.identity()
    before.read(name)
    assert {name, f"{name}_scale_inv"} == before.source.digests.keys()
    file = Path(fp8) / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}_scale_inv"] *= 2
    save_file(tensors, file, {"format": "pt"})
    assert Checkpoint(fp8).identity() != identity


def test_blocks_may_be_larger_than_anything(tmp_path):
    make_model(tmp_path / "model")
    fp8, plain = make_fp8(tmp_path / "model", block=(1000, 1000))
    file = Path(fp8) / "config.json"
    file.write_text(file.read_text().replace("[1000, 1000]", f"[{2**62}, {2**62}]"))
    checkpoint = Checkpoint(fp8)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in load_tensors(plain).items())
    (line,) = checkpoint.notes()
    assert line == f"{fp8}: its FP8 weights are multiplied with their scales as they are read, to bfloat16"


def _changed(fp8, change):
    file = Path(fp8) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale_inv"), r"holds \S+up_proj\.weight in float8_e4m3fn without its scales"),
        (
            lambda t: t.update({f"{NAME}_scale_inv": torch.ones(5, 2)}),
            r"holds scales \S+ \[5, 2\], which are not those of \S+up_proj\.weight \[48, 32\]",
        ),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(48)}), r"scales \S+ \[48\], which are not those"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(3, 2).long()}), r"scales \S+ of int64; they must be of"),
    ],
    ids=["none", "grid", "line", "dtype"],
)
def test_scales_that_do_not_fit_are_an_error(tmp_path, change, message):
    make_model(tmp_path / "model")
    fp8, _ = make_fp8(tmp_path / "model")
    _changed(fp8, change)
    with pytest.raises(InputError, match=message):
        Checkpoint(fp8)


@pytest.mark.parametrize("size", [[0, 16], [16], "large", [16, 16, 16]], ids=str)
def test_a_block_size_that_is_none_is_an_error(tmp_path, size):
    make_model(tmp_path / "model")
    fp8, _ = make_fp8(tmp_path / "model")
    file = Path(fp8) / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weight_block_size"] = size
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: quantization_config") as caught:
        Checkpoint(fp8)
    assert "weight_block_size" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "scales", "size", "fits"),
    [
        (128, 2, 128, True),  # [2 x 128 rows], a block for each part
        (16, 2, 24, False),  # blocks of 24 and 8 rows: the first is of both parts, though equal parts would fit
        (224, 4, 128, False),  # 3.5 blocks: the second one is of both
        (48, 6, 128, True),  # equal parts, of 16 rows
    ],
)
def test_blocks_end_where_parts_of_an_expert_do(rows, scales, size, fits):
    """Scales of gate and up of two experts, in one tensor."""
    part = Slice((2, 2 * rows, 16), 0, 0, 2, Layout(False, False))
    files = {
        "gate_up_proj": Entry("f", torch.float8_e4m3fn, (2, 2 * rows, 16), 0, 64 * rows),
        "gate_up_proj_scale_inv": Entry("f", torch.float32, (2, scales, 1), 0, 8 * scales),
    }
    weights = Fp8Weights(QuantisationConfig(weight_block_size=(size, size)), torch.float32, "model", "model")
    place = Place("gate_up_proj", part)
    if fits:
        assert weights.entry(place, files).shape == (rows, 16)
    else:
        with pytest.raises(InputError, match="a block is of two parts of an expert"):
            weights.entry(place, files)
