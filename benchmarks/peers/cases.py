"""Models and calibration tokens that both tools get."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shardprune.recipes.demo import bundled_model


@dataclass(frozen=True)
class Case:
    """A checkpoint and a .npy file of tokens, int64 [samples, seqlen]."""

    name: str
    model: str
    tokens: str


def trained(model: str, folder: str, samples: int, seqlen: int) -> Case:
    """Return a given model with windows of the standard library's source."""
    from shardprune.model.opening import open_model
    from shardprune.storage.windows import calibration_windows

    opened = open_model(model)
    vocabulary = opened.skeleton.config.vocab_size
    tokens = calibration_windows("stdlib", opened.tokenizer, samples, seqlen, 0, vocabulary)
    return _case(f"{Path(model).name}, {samples} x {seqlen}", model, f"{folder}/trained.npy", tokens)


def random_llama(folder: str, hidden: int, layers: int, samples: int, seqlen: int) -> Case:
    """Make a Llama of random weights and random tokens; with hidden 1024 and 8 layers it has 94 million parameters."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=seqlen,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(f"{folder}/random")
    for file in Path(bundled_model()).glob("tokenizer*"):  # llm-compressor asks for one, whatever it is given
        shutil.copy(file, f"{folder}/random")
    tokens = torch.randint(256, (samples, seqlen))
    name = f"random, {model.num_parameters() / 1e6:.0f} M, {samples} x {seqlen}"
    return _case(name, f"{folder}/random", f"{folder}/random.npy", tokens)


def _case(name: str, model: str, file: str, tokens: torch.Tensor) -> Case:
    numpy.save(file, tokens.numpy())
    return Case(name, model, file)
