"""Trained tensors as they are written: those that their dtype cannot hold, and heads beside the embedding."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from shardprune.errors import TrainingError
from tests.recovery.trainings import SHALLOW, make_sparse, train
from tests.support.tiny import load_tensors

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("full", [False, True], ids=["updates", "all"])
def test_a_tensor_that_overflows_when_it_is_stored_is_named(folder, tmp_path, full):
    make_sparse(tmp_path / "model", configs=SHALLOW, dtype=torch.float16)
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"^layer 0 .*: the trained tensor overflows float16, .*learning rate"):
        train(folder, out, model=str(tmp_path / "model"), full=full, steps=1, warmup=0, learning_rate=1e6)
    assert not list(out.glob("*.safetensors"))


def test_a_head_beside_a_tied_embedding_is_trained_as_what_it_is(folder, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    make_sparse(model, "llama-grouped-tied", configs=SHALLOW)
    tensors = load_tensors(model)
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    train(folder, out, model=str(model), full=True, steps=1)
    written = load_tensors(out)
    assert torch.allclose(written[HEAD], tensors[HEAD], atol=0.01)
    assert torch.allclose(written[EMBEDDING], tensors[EMBEDDING], atol=0.01)
    assert not torch.equal(written[HEAD], tensors[HEAD])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight, written[HEAD])
    assert torch.equal(loaded.model.embed_tokens.weight, written[EMBEDDING])
