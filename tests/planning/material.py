"""Models of any shape with random weights, and runs over them in processes of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from shardprune import ExpertsRecipe, Recipe, experts, prune
from shardprune.model.checkpoint import SINGLE
from shardprune.model.skeleton import Skeleton
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import write_tensors

# glibc would keep blocks that are smaller than the largest one it has ever given back.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "HF_HUB_OFFLINE": "1"}
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


@contextmanager
def forked_runs() -> Iterator[Callable[[Path, dict[str, object]], int]]:
    """Runs in forks of one process that has imported all that they need: imports take longer than these runs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["shardprune.commands.prune", "transformers.models.llama.modeling_llama"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
            yield lambda out, options: pool.submit(_forked_peak, out, options).result()


def _forked_peak(out: Path, options: dict[str, object]) -> int:
    kind, run = (ExpertsRecipe, experts) if "keep" in options else (Recipe, prune)
    recipe = kind.checked({**options, "out": str(out), "backend": "local", "threads": 1, "report": False})
    return max(worker.peak_bytes for worker in run(recipe, Reporter(quiet=True)).workers)


def peak_of_run(out: Path, options: dict[str, object]) -> int:
    """The peak memory of `shardprune prune` in a process of its own, as its result has it."""
    arguments = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        arguments += (
            [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
        )
    environment = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, "-m", "shardprune", "prune", "--out", str(out), "--backend", "local", "--threads", "1"]
    model = arguments.pop(arguments.index("--model") + 1)
    arguments.remove("--model")
    done = subprocess.run([*command, model, *arguments], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    return max(worker["peak_bytes"] for worker in result["workers"])
