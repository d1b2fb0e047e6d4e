"""Runs over architectures without a row in the table of families: what they measure and write."""

import re

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import attention_of
from shardprune.model.skeleton import Skeleton
from tests.support.architectures import DENSE, MIXED, make_architecture
from tests.support.running import run, search_run
from tests.support.tiny import differing, load_tensors, make_tokens

PARALLEL = ("cohere2", "phi")  # attention and MLP read the same input


def matrices_left_dense(path) -> set[str]:
    """The names on disk of the matrices of a checkpoint's layers that are not pruned."""
    checkpoint = Checkpoint(path)
    family = Skeleton(checkpoint.config, "cpu").family
    return {
        stored
        for index, kind in enumerate(family.kinds)
        for names in kind.kept.values()
        for name in names
        for stored in checkpoint.place(f"{family.layers}.{index}.{name}").names
    }


@torch.no_grad()
def perplexity(path, tokens: torch.Tensor, device: str = "cpu") -> float:
    """The perplexity of what transformers loads, which finds every tensor and no other."""
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    model.set_attn_implementation(attention_of(model.config))
    logits = model.eval().to(device)(tokens.to(device)).logits[:, :-1].cpu()
    return float(cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).exp())


@pytest.mark.parametrize("model_type", [*DENSE, *MIXED])
def test_a_run_equals_transformers_before_and_after(model_type, tmp_path):
    dense = make_architecture(tmp_path / "model", model_type, {**DENSE, **MIXED}[model_type])
    tokens = torch.from_numpy(np.load(make_tokens(tmp_path / "tokens.npy")))
    result = run(tmp_path, "out", eval=(str(tmp_path / "tokens.npy"),), sparsity=0.5)
    (measured,) = result.perplexity.values()
    assert measured.before == pytest.approx(perplexity(dense, tokens), rel=1e-4)
    assert measured.after == pytest.approx(perplexity(tmp_path / "out", tokens), rel=1e-4)
    assert measured.after != pytest.approx(measured.before, rel=1e-3)

    before, after = load_tensors(dense), load_tensors(tmp_path / "out")
    kept = matrices_left_dense(dense)
    assert (not kept) or model_type in MIXED
    matrices = {name for name, tensor in before.items() if tensor.dim() == 2 and re.search(r"\.\d+\.", name)} - kept
    assert {name for name in before if not torch.equal(before[name], after[name])} == matrices
    assert len(result.sparsity.projections) == len(matrices)
    zeros = sum(int((after[name] == 0).sum()) for name in matrices)
    weights = sum(before[name].numel() for name in matrices)
    assert zeros / weights == result.sparsity.achieved == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("model_type", ["apertus", "gpt_neox", "phi", "nemotron_h", "olmo_hybrid", "qwen3_5_text"])
def test_sharded_and_streamed_equals_single(model_type, tmp_path):
    make_architecture(tmp_path / "model", model_type, {**DENSE, **MIXED}[model_type])
    make_tokens(tmp_path / "tokens.npy")
    run(tmp_path, "single", pattern="2:4")
    run(tmp_path, "sharded", pattern="2:4", shards=2, weights="streamed")
    assert differing(tmp_path / "single", tmp_path / "sharded") == []


@pytest.mark.parametrize("model_type", PARALLEL)
def test_masks_of_parallel_blocks_are_rebuilt(model_type, tmp_path):
    make_architecture(tmp_path / "model", model_type, DENSE[model_type])
    make_tokens(tmp_path / "tokens.npy")
    result = run(tmp_path, "out", sparsity=0.5, rebuild="barber", rebuild_threshold=0.5)
    assert [(block.layer, block.block) for block in result.sparsity.blocks][:2] == [(0, "attention"), (0, "mlp")]
    assert all(block.error_after <= block.error_before for block in result.sparsity.blocks)


def test_structures_that_are_not_known_are_refused_in_one_line(tmp_path):
    make_architecture(tmp_path / "model", "gemma", DENSE["gemma"])
    make_tokens(tmp_path / "tokens.npy")
    reason = "the heads, neurons and outputs of model_type 'gemma' are not known, only those of llama, mistral, "
    with pytest.raises(InputError, match=f"^structured: {reason}"):
        run(tmp_path, "out", structured=0.3)
    with pytest.raises(InputError, match=f"^targets: {reason}"):
        run(tmp_path, "out", sparsity=0.5, targets="stream")
    with pytest.raises(InputError, match=f"^model: {reason}"):
        search_run(tmp_path, "out", remove=0.3)
    assert not (tmp_path / "out").exists()
