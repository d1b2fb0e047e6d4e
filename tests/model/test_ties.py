"""Ties of embedding and head are what transformers makes of config and files, in every command that opens a model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.opening import open_model
from shardprune.recovery.model import load_model
from tests.commands.test_prune import PUBLIC
from tests.support.running import run, search_run
from tests.support.tiny import load_tensors, make_llava, make_model, make_tokens

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OPT_EMBEDDING = "model.decoder.embed_tokens.weight"


def change_config(model: Path, **fields) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **fields}))


def own_head(folder: Path, family: str = "llama") -> Path:
    """A model whose config ties its embeddings, and whose file holds a head of its own."""
    make_model(folder, family)
    tensors = load_file(folder / "model.safetensors")
    if HEAD not in tensors:
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors[HEAD] = torch.randn(tensors[embedding].shape, generator=torch.Generator().manual_seed(3)) * 0.2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, tie_word_embeddings=True)
    return folder


def head_alone(folder: Path) -> Path:
    """A tied model that was saved under the head's name."""
    make_model(folder, "llama-grouped-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def both_equal(folder: Path) -> Path:
    """A tied model that was saved under both names."""
    make_model(folder, "llama-grouped-tied")
    tensors = load_file(folder / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def perplexity(model: str | Path, windows: torch.Tensor, auto=AutoModelForCausalLM) -> float:
    """Perplexity of a checkpoint as transformers loads it."""
    loaded = auto.from_pretrained(model, attn_implementation="sdpa").eval()
    losses = [loaded(window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())
