"""A run that cannot fit is refused by its workers before any weight is read."""

import json
import math
import resource
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig

from shardprune.cluster.layout import plan_layout
from shardprune.model.skeleton import Skeleton
from shardprune.planning.moments import Setup
from shardprune.planning.needs import needs
from shardprune.planning.workload import model_of, task_of
from shardprune.recipes.prune import PruneRecipe
from shardprune.shard.memory import memory_of
from tests.planning.material import make_windows

LIMIT = 8 * 10**9  # address space, of which a process with torch takes some before it reads anything


def make_hollow_model(folder):
    """One layer as wide as Llama-70B's in a file without blocks on disk; reading a tensor would give zeros."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, shape in Skeleton(config, "cpu").tensors().items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return config


@pytest.mark.parametrize(
    ("what", "taken", "step", "helps"),
    [
        (("--sparsity", "0.5"), "14.", "check down", "method wanda without measure_error"),
        pytest.param(
            *(("--structured", "0.2"), "18.", "choose down", "score amp without correction and measure_error"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["zeroing", "structured"],
)
def test_a_worker_that_cannot_have_enough_memory_says_so_at_once(what, taken, step, helps, tmp_path):
    make_hollow_model(tmp_path)
    windows = make_windows(tmp_path / "tokens.npy", 2, 16, 64)
    command = [sys.executable, "-m", "shardprune", "prune", str(tmp_path), "--out", str(tmp_path / "out")]
    options = [*what, "--calibration", windows, "--samples", "2", "--seqlen", "16", "--backend", "local"]
    done = subprocess.run(
        [*command, *options, "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: memory: a worker takes {taken}")
    assert f"(prune, {step}), and its cpu has 8.0 GB: " in line
    assert f"{helps} takes " in line
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_what_is_needed_is_the_least_that_would_do(tmp_path):
    config = make_hollow_model(tmp_path)
    config.num_hidden_layers = 8
    skeleton = Skeleton(config, "cpu", torch.bfloat16)
    model = model_of(skeleton, "hollow", torch.bfloat16)

    def bytes_of(shards=1, **fields):
        recipe = PruneRecipe(model="hollow", out="out", sparsity=0.5, device="cuda", **fields)
        task = task_of(
            model,
            recipe.zeroing,
            errors=True,
            samples=recipe.samples,
            seqlen=recipe.seqlen,
            wave=recipe.sequences_per_wave,
            sources=0,
            windows=0,
            itemsize=2,
        )
        layout = plan_layout(8, recipe.samples, "exact", shards, 1, None)
        setup = Setup(layout, recipe.asked.streamed, waves_on_host=recipe.activations != "device", gpu=True)
        return [need.bytes for need in needs(task, setup)]

    (whole,) = bytes_of()
    (streamed,) = bytes_of(weights="streamed")
    (kept,) = bytes_of(activations="device")
    assert whole - streamed == (8 - 2) * 2 * model.layer + 2 * model.embedding
    assert kept - whole == 128 * 2048 * 8192 * 2  # where they may be on the host, they are not counted
    assert max(bytes_of(shards=4)) < whole
    assert memory_of(torch.device("cpu")) > 2**30
