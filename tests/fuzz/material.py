"""Files of every kind that a command reads, all of them well-formed: the material that inputs are made from.

Everything is tiny, and names are relative to the folder, so that a copy of it elsewhere is the same material.
"""

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import transformers
import yaml

from shardprune import (
    EvaluateRecipe,
    ExpertsRecipe,
    ExportRecipe,
    MopRecipe,
    Recipe,
    evaluate,
    experts,
    export,
    mop,
    prune,
)
from shardprune.report.progress import Reporter
from tests.support.dying import dying_at
from tests.support.words import WORDS, words_tokenizer

VOCABULARY, LAYERS, SEQLEN, SAMPLES = 32, 2, 16, 4
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
COMMON = {"backend": "local", "threads": 1, "samples": SAMPLES, "seqlen": SEQLEN, "calibration": "tokens.npy"}
PRUNING = {"model": "model", "method": "wanda", "sparsity": 0.5, "report": False, **COMMON}
QUIET = Reporter(quiet=True)


def make_material() -> None:
    """Make all of it in the working directory."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    mixture = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**CONFIG, **EXPERTS))
    for parameter in (*model.parameters(), *mixture.parameters()):
        parameter.data.normal_(0, 0.2)
    model.save_pretrained("model")
    model.save_pretrained("sharded", max_shard_size=6000)
    mixture.save_pretrained("mixture")
    for folder in ("model", "sharded", "mixture"):
        words_tokenizer().save_pretrained(folder)
    _make_texts()
    _make_recipes()
    _make_runs()


def _make_texts() -> None:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS[3:], k=count))

    np.save("tokens.npy", np.random.default_rng(0).integers(0, VOCABULARY, (SAMPLES, SEQLEN)))
    Path("text.txt").write_text("\n".join(words(20) for _ in range(12)))
    documents = [{"text": words(24), "source": "web", "id": number} for number in range(8)]
    Path("documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    instructions = [{"instruction": words(4), "input": words(2), "output": words(6)} for _ in range(6)]
    Path("instructions.json").write_text(json.dumps(instructions))
    Path("instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instructions))
    settings = {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}, "zero_allow_untested_optimizer": True}
    Path("deepspeed.json").write_text(json.dumps(settings))
    adapter = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "model", "target_modules": ["q_proj"]}
    Path("adapter_config.json").write_text(json.dumps(adapter))
    Path("tasks").mkdir()
    pairs = [{"good": words(3), "bad": words(3)} for _ in range(4)]
    Path("tasks/pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "tasks/pairs.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    }
    Path("tasks/pairs.yaml").write_text(yaml.safe_dump(task))


def _make_recipes() -> None:
    training = {
        "data": "documents.jsonl",
        "lora_rank": 4,
        "steps": 1,
        "batch": 2,
        "length": SEQLEN,
        "backend": "local",
        "threads": 1,
    }
    recipes = {
        "prune": {**PRUNING, "eval": ["tokens.npy"], "allocation": "uniform", "out": "out"},
        "job": {name: value for name, value in PRUNING.items() if name != "backend"} | {"out": "out"},
        "mop": {"model": "model", "remove": 0.2, "report": False, **COMMON, "out": "out"},
        "recover": {"model": "pruned", "keep_sparsity": True, **training, "out": "out"},
        "evaluate": {"model": "pruned", "perplexity": ["tokens.npy"], "seqlen": SEQLEN, "backend": "local"},
        "pipeline": {
            "model": "model",
            "out": "out",
            "backend": "local",
            "threads": 1,
            "report": False,
            "prune": {"sparsity": 0.5, **{name: COMMON[name] for name in ("samples", "seqlen", "calibration")}},
            "evaluate": {"perplexity": ["tokens.npy"], "seqlen": SEQLEN},
        },
    }
    for name, values in recipes.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def _make_runs() -> None:
    """Outputs: of a run that is finished, of one that was cut off, and of others."""
    evaluated = {**PRUNING, "eval": ("tokens.npy",)}
    prune(Recipe.checked({**evaluated, "out": "pruned"}), QUIET)
    with suppress(KeyboardInterrupt), dying_at(LAYERS - 1):
        prune(Recipe.checked({**evaluated, "out": "half"}), QUIET)
    mop(MopRecipe.checked({"model": "model", "out": "mopped", "path": "G", "report": False, **COMMON}), QUIET)
    fewer = {"model": "mixture", "out": "fewer", "keep": 2, "report": False, **COMMON}
    experts(ExpertsRecipe.checked(fewer), QUIET)
    export(ExportRecipe.checked({"model": "pruned", "to": "exported"}), QUIET)
    measured = {"model": "pruned", "perplexity": ("tokens.npy",), "seqlen": SEQLEN, "backend": "local", "threads": 1}
    shutil.copytree("pruned", "measured")
    evaluate(EvaluateRecipe.checked({**measured, "model": "measured", "report": False}), QUIET)
