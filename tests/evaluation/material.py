"""Models with a tokenizer, and tasks of a few documents."""

import json
import random
from pathlib import Path

import yaml
from lm_eval.api.instance import Instance

from shardprune import EvaluateRecipe, evaluate
from shardprune.cluster.local_backend import LocalBackend
from shardprune.evaluation.harness import ShardedLM
from shardprune.evaluation.sharded import ShardedModel
from shardprune.recipes.evaluate import ShardFields
from shardprune.report.progress import Reporter
from tests.support.tiny import make_model
from tests.support.words import WORDS, words_tokenizer

QUIET = Reporter(quiet=True)


def make_readable(folder: Path, family: str = "llama-3.1") -> str:
    """A tiny model that reads words."""
    words_tokenizer().save_pretrained(folder)
    return make_model(folder, family)


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS[3:], k=words))


def sharded(model: str, **settings) -> ShardedLM:
    """lm-eval's view of a model on workers of this process."""
    shards = ShardFields.checked({"backend": "local", "threads": 1, "shards": 2, **settings})
    return ShardedLM(ShardedModel(model, shards, LocalBackend(), QUIET))


def reading(lm):
    """The same with the tokenizer of words, in whose place transformers puts one of its own for some families."""
    lm.tokenizer = words_tokenizer()
    return lm


def requests_of(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


def write_task(folder: Path, name: str, documents: int = 6, seed: int = 0, **fields) -> None:
    """A task of lm-eval: which of two texts is better, the first always being so."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    pairs = [{"good": text(draw, draw.randint(2, 7)), "bad": text(draw, draw.randint(2, 7))} for _ in range(documents)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def evaluated(model: str | Path, **fields):
    """Evaluate in this process, quietly."""
    values = {"model": str(model), "backend": "local", "threads": 1, **fields}
    return evaluate(EvaluateRecipe.checked(values), QUIET)
