"""Runs over mixtures whose files have all experts of a layer in one tensor."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardprune.commands.check import check
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import read_header
from tests.support.architectures import MIXTURES, make_architecture
from tests.support.running import run
from tests.support.tiny import differing, load_tensors, make_tokens

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs for one mixture whose experts are tensors of their own, and all of a layer in one."""
    folder = tmp_path_factory.mktemp("stacked")
    make_architecture(folder / "listed", "qwen3_5_moe_text", MIXTURES["qwen3_5_moe_text"])
    model = AutoModelForCausalLM.from_pretrained(folder / "listed")
    model.save_pretrained(folder / "stacked", save_original_format=False)
    make_tokens(folder / "tokens.npy")
    for name in ("listed", "stacked"):
        run(folder, f"{name}-out", name, pattern="2:4", shards=2)
    return folder


def parts_of(path):
    """All tensors of a checkpoint by their names in the model."""
    checkpoint = Checkpoint(str(path))
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def test_the_layout_makes_no_difference_and_is_kept(outputs):
    listed, own = parts_of(outputs / "listed-out"), parts_of(outputs / "stacked-out")
    assert listed.keys() == own.keys()
    assert [tensor for tensor in listed if not torch.equal(listed[tensor], own[tensor])] == []
    before, after = load_tensors(outputs / "stacked"), load_tensors(outputs / "stacked-out")
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    assert before[stack].dim() == 3
    assert {key: tensor.shape for key, tensor in before.items()} == {key: t.shape for key, t in after.items()}
    (verdict,) = check(str(outputs / "stacked-out"))
    assert verdict.faults == []
    assert verdict.tensors == len(after)


def test_a_part_that_changed_is_found(outputs, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(outputs / "stacked-out", folder)
    (file,) = folder.glob("model-00002-*")
    entry = read_header(Folder(str(folder), "out"), file.name)[0]["model.layers.0.mlp.experts.down_proj"]
    content = bytearray(file.read_bytes())
    content[entry.end - 4 : entry.end] = b"\0\0\0\0" if any(content[entry.end - 4 : entry.end]) else b"\0\0\0@"
    file.write_bytes(content)
    (verdict,) = check(str(folder))
    faults = "\n".join(verdict.faults)
    assert "model.layers.0.mlp.experts.down_proj is not what was written" in faults
    assert re.search(r"down_proj\[3\] part 0 of 1 has \d+ zeros, and its record says \d+", faults)
    assert len(re.findall("down_proj.*record says", faults)) == 1


def test_experts_that_are_there_twice_are_refused(outputs, tmp_path):
    tensors = load_file(outputs / "stacked" / FILE) | load_file(outputs / "listed" / FILE)
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    shutil.copy(outputs / "listed" / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"holds model\.layers\.0\.mlp\.experts\.\S+.* under two names"):
        Checkpoint(str(tmp_path))


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(outputs, dies_at_layer):
    dies_at_layer(1)
    with pytest.raises(KeyboardInterrupt):
        run(outputs, "cut", "stacked", pattern="2:4")
    assert not (outputs / "cut" / "result.json").exists()
    run(outputs, "cut", "stacked", pattern="2:4")
    assert differing(outputs / "stacked-out", outputs / "cut") == []
