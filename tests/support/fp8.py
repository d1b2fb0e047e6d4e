"""Tiny FP8 checkpoints, made of others with a plain formulation, and the models that are the products of their weights
and scales."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.tiny import load_tensors

LARGEST = 448.0  # of float8_e4m3fn
LEFT = ("embed_tokens", "lm_head", "gate.weight", "mtp")  # modules that are not converted


def expanded(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """The scale of every element."""
    whole = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


def converted(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight") and not any(left in name for left in LEFT)


def make_fp8(
    folder: Path,
    *,
    block: tuple[int, int] | None = (16, 16),
    scales_name: Callable[[str], str] = "{}_scale_inv".format,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[str, str]:
    """Save, beside a model, its FP8 form and the bfloat16 model that this is; return their folders.

    Args:
        block: that has one scale; None: a whole weight.
        scales_name: returns the name of the scales of a weight.
    """
    fp8, plain = folder.with_name(f"{folder.name}-fp8"), folder.with_name(f"{folder.name}-plain")
    for place in (fp8, plain):
        shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored, products = {}, {}
    for name, tensor in load_tensors(folder).items():
        if not converted(name, tensor):
            stored[name] = products[name] = tensor.to(torch.bfloat16) if tensor.ndim > 1 else tensor
            continue
        rows, cols = block or tensor.shape
        grid = [[part.abs().max() for part in band.split(cols, 1)] for band in tensor.split(rows, 0)]
        scales = torch.tensor(grid) / LARGEST
        scales = scales.to(scale_dtype)
        factors = expanded(scales, (rows, cols), tensor.shape)
        stored[name] = (tensor / factors).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        stored[scales_name(name)] = scales if block else scales.reshape(())
        products[name] = (stored[name].float() * factors).to(torch.bfloat16)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    quantised = {
        **{"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"},
        **{"weight_block_size": list(block) if block else None, "modules_to_not_convert": ["lm_head"]},
    }
    save_file(stored, fp8 / "model.safetensors", {"format": "pt"})
    save_file(products, plain / "model.safetensors", {"format": "pt"})
    (fp8 / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    (plain / "config.json").write_text(json.dumps(config))
    return str(fp8), str(plain)
