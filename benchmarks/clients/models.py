"""Outputs of every kind over random models in float32: structured, MoP, composite, 2:4, and with fewer experts."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3MoeConfig,
)

from shardprune import ExpertsRecipe, MopRecipe, Recipe, experts, mop, prune
from shardprune.report.progress import Reporter

KINDS = {
    "structured": {"structured": 0.25},
    "MoP": {"remove": 0.25},  # of the layers
    "composite": {"structured": 0.2, "sparsity": 0.5},
    "2:4": {"pattern": "2:4"},
    "experts": {"remove": 0.5},
}


def make_outputs(folder: Path, kinds: list[str], tokenizer: str, hidden: int, layers: int) -> dict[str, Path]:
    """Make the outputs of some kinds, and return their places by kind."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    own = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": len(words)}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "initializer_range": 0.05}
    shared = {**own, **heads, **ends, "max_position_embeddings": 1024}
    share = _make(folder / "dense", LlamaConfig(**shared, intermediate_size=3 * hidden), words)
    # As all published models of the family have it, and as llama.cpp takes it for granted.
    mixture = {
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": hidden // 4,
        "norm_topk_prob": True,
    }
    _make(folder / "mixture", Qwen3MoeConfig(**shared, **mixture, intermediate_size=3 * hidden), words)
    places = {}
    for kind in kinds:
        fields = KINDS[kind]
        places[kind] = folder / kind.replace(":", "")
        model = folder / ("mixture" if kind == "experts" else "dense")
        text = {"calibration": "constraints.txt", "samples": 4, "seqlen": 64}
        if kind == "MoP":
            fields = {"remove": share * fields["remove"]}
        values = {"model": str(model), "out": str(places[kind]), "backend": "local", "threads": 1, **text, **fields}
        command, recipe = {"MoP": (mop, MopRecipe), "experts": (experts, ExpertsRecipe)}.get(kind, (prune, Recipe))
        command(recipe.checked(values), Reporter(quiet=True))
    return places


def _make(place: Path, config: PretrainedConfig, words: PreTrainedTokenizerBase) -> float:
    """Write a random model; return the share of its parameters that the layers have."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(place)
    words.save_pretrained(place)
    return sum(weight.numel() for weight in model.model.layers.parameters()) / model.num_parameters()
