"""Models of any shape with random weights, and runs over them in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from shardprune.model.checkpoint import SINGLE
from shardprune.model.skeleton import Skeleton
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import write_tensors

CONFIGS = Path(__file__).resolve().parents[2] / "ray_configs" / "models"


def make_llama(folder: Path, hidden: int, intermediate: int, layers: int, vocabulary: int, dtype=torch.float32) -> str:
    """Write a Llama of random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        dtype=dtype,
    )
    config.save_pretrained(folder)
    tensors = {}
    for name, shape in Skeleton(config, "cpu").tensors().items():
        large = shape[0] > 10_000  # random numbers take time
        values = torch.randn(shape[0], 1) * torch.randn(shape[-1]) if large else torch.randn(shape)
        tensors[name] = (torch.ones(shape) if len(shape) == 1 else values.mul_(0.02)).to(dtype)
    write_tensors(Folder(str(folder), "out"), SINGLE, tensors, {})
    return str(folder)


def make_windows(path: Path, samples: int, seqlen: int, vocabulary: int) -> str:
    np.save(path, np.random.default_rng(0).integers(0, vocabulary, (samples, seqlen)))
    return str(path)


def peak_of_run(out: Path, options: dict[str, object]) -> int:
    """The peak memory of `shardprune prune` in a process of its own, as its result has it."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        arguments += (
            [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    # glibc would keep blocks that are smaller than the largest one it has ever given back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "shardprune", "prune", "--out", str(out), "--backend", "local", "--threads", "1"]
    model = arguments.pop(arguments.index("--model") + 1)
    arguments.remove("--model")
    done = subprocess.run([*command, model, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    return max(worker["peak_bytes"] for worker in result["workers"])
