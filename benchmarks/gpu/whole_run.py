"""Whole runs of the bundled model in this process: on the device twice and with its copies beside the computation, to
the bit the same, and on the CPU."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from shardprune.report.result import Perplexity

EVALUATED = "stdlib"
NEAR = 1e-3  # of the perplexity after pruning: at near-ties sums in another order choose other zeros
SAME = 1e-4  # of the dense one
# Copies beside the computation: waves that come and go, layers that are read ahead.
BESIDE = {"activations on the host": {"activations": "host"}, "layers streamed": {"weights": "streamed"}}


def run(setting: Setting, rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = prune_bundled(setting, setting.device, f"{folder}/first", rows)
        for name, fields in {"again": {}, **BESIDE}.items():
            other = prune_bundled(setting, setting.device, f"{folder}/{name}", rows, **fields)
            same = digest_of(f"{folder}/{name}") == digest_of(f"{folder}/first") and other == first
            rows.add(f"{name}: the same to the bit", same, ok=same)
        if setting.cuda:
            there = prune_bundled(setting, "cpu", f"{folder}/cpu", rows)
            for label, ours, theirs, limit in (
                ("dense", first.before, there.before, SAME),
                ("pruned", first.after, there.after, NEAR),
            ):
                distance = abs(ours / theirs - 1)
                rows.add(f"perplexity, {label}, distance from the CPU's", distance, ok=distance < limit)


def prune_bundled(setting: Setting, device: str, out: str, rows: Rows, **fields: Any) -> Perplexity:
    """Prune the bundled model to 50 % in float32, by SparseGPT unless `fields` say otherwise.

    Returns its perplexities.
    """
    values = {
        "model": bundled_model(),
        "out": out,
        "sparsity": 0.5,
        "calibration": "stdlib",
        "samples": setting.size(16, 2),
        "seqlen": setting.size(256, 64),
        "eval": (EVALUATED,),
        "eval_windows": setting.size(40, 2),
        "device": device,
        "dtype": "float32",
        "threads": setting.size(0, 1) or None,
        "backend": "local",
        "report": False,
        **fields,
    }
    result = prune(Recipe.checked(values), Reporter(quiet=True))
    measured = result.perplexity[EVALUATED]
    rows.add(f"{Path(out).name} run on {device}: perplexity", f"{measured.before:.4f} -> {measured.after:.4f}")
    rows.add(f"{Path(out).name} run on {device}", result.seconds["total"], "s")
    return measured


def digest_of(out: str) -> str:
    """Return a hash of the tensors of an output; headers hold seconds."""
    digest = hashlib.sha256()
    for file in sorted(Path(out).rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                content = tensors.get_tensor(name).contiguous().view(torch.uint8)
                digest.update(name.encode() + content.numpy().tobytes())
    return digest.hexdigest()
