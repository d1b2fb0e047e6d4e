"""What was removed from a model, as its layer files say, and the same cut out of the whole model."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from tests.solvers.test_structures import plain_columns

M = 1.5
OUTPUTS = {  # whose columns are structures, by family: of the attention, of the MLP
    "opt": ("self_attn.out_proj", "fc2"),
    "others": ("self_attn.o_proj", "mlp.down_proj"),
}
INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "fc1")


COMPOSITE = {"structured": 0.3, "sparsity": 0.5}


def share_of(family: str) -> float:
    """A share for which groups go: of Gemma 2, whose heads divide the hidden size, two or none."""
    return 0.5 if family == "gemma2" else 0.3


def outputs_of(family: str) -> tuple[str, str]:
    return OUTPUTS.get(family.split("-")[0], OUTPUTS["others"])


def layers_of(model) -> torch.nn.ModuleList:
    return (model.model.decoder if hasattr(model.model, "decoder") else model.model).layers


def records(out) -> list[dict]:
    """The structures that every layer has kept, as the headers of the layer files say."""
    found = []
    for file in sorted(Path(out).glob("model-*"))[1:]:
        with safe_open(file, "pt") as opened:
            record = json.loads(opened.metadata()["shardprune"])
            found.append({"layer": record["layer"], **record["kept"]})
    return found


def cut(layers, family: str, kept: list[dict], groups: int) -> None:
    """Make the output projections' columns of all structures but those kept zero."""
    for layer, record in zip(layers, kept, strict=True):
        for name, unit in zip(outputs_of(family), ("groups", "neurons"), strict=True):
            weight = layer.get_parameter(f"{name}.weight").data
            size = weight.shape[1] // groups if unit == "groups" else 1
            gone = sorted(set(range(weight.shape[1])) - set(plain_columns(record[unit], size)))
            weight[:, gone] = 0


def loaded(out):
    """A checkpoint that has all tensors of its config and no others, as transformers loads it."""
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def written(out) -> dict[str, int]:
    """When each file with weights was written."""
    return {path.name: path.stat().st_mtime_ns for path in Path(out).glob("model-*.safetensors")}
