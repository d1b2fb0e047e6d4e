"""Tiny searches whose candidates are tuned before they are scored."""

import json
from pathlib import Path

import numpy as np

from tests.support.running import search_recipe, search_run
from tests.support.tiny import GROUPED, make_model, make_tokens
from tests.support.words import WORDS, words_tokenizer

DOCUMENTS = "documents.jsonl"
SHARE = 0.3  # two iterations
TUNED = {"tune_candidates": 3, "tune_length": 12, "tune_batch": 4, "tune_learning_rate": 1e-2, "seed": 5}


def make_material(folder: Path) -> Path:
    """Make the model and the texts of a search."""
    make_model(folder / "model", "llama-3.1", configs=GROUPED)
    words_tokenizer().save_pretrained(folder / "model")
    make_tokens(folder / "tokens.npy")
    draw = np.random.default_rng(1)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS[3:], 8))}) for _ in range(24)]
    (folder / DOCUMENTS).write_text("\n".join(lines))
    return folder


def tuned_search(folder, out, **fields):
    return search_run(folder, out, **_fields(folder, fields))


def tuned_recipe(folder, out, **fields):
    return search_recipe(folder, out, **_fields(folder, fields))


def _fields(folder, fields):
    return {"remove": SHARE, "tune_data": str(folder / DOCUMENTS), **TUNED, **fields}
