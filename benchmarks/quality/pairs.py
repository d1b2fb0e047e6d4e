"""Accuracy on pairs of sentences, such as BLiMP's (arXiv 1912.00582), by the log-likelihoods of a model on its shards.

Sentences are tokenised as lm-eval does it: behind the token that begins a text, with a space before them.
"""

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from shardprune.cluster.backends import backend_of
from shardprune.cluster.likelihoods import Query
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.tokenizer import check_ends
from shardprune.recipes.evaluate import ShardFields
from shardprune.report.progress import Reporter

GOOD, BAD = "sentence_good", "sentence_bad"


def accuracies(model: str, folder: str, workers: Mapping[str, Any]) -> dict[str, float]:
    """Return, for each task, the share of its pairs whose good sentence is the likelier one.

    Args:
        folder: holds a file TASK.jsonl for every task, with a pair `sentence_good` and `sentence_bad` in every line.
        workers: fields of a recipe that say on what the model runs.
    """
    settings = ShardFields.checked(dict(workers))
    tasks = {file.stem: _sentences(file) for file in sorted(Path(folder).glob("*.jsonl"))}
    with closing(backend_of(settings)) as backend:
        sharded = ShardedModel(model, settings, backend, Reporter(quiet=True))
        tokenizer: Any = sharded.opened.tokenizer()
        check_ends(tokenizer, "model")
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        texts = sorted({f" {sentence}" for sentences in tasks.values() for sentence in sentences})
        queries = []
        for tokens in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
            queries.append(Query((first, *tokens[:-1]), (tuple(tokens),)))
        with closing(sharded):
            found = sharded.log_likelihoods(queries, max(len(query.tokens) for query in queries))
    likely = {text: value for text, ((value, _),) in zip(texts, found, strict=True)}
    return {
        task: sum(
            likely[f" {good}"] > likely[f" {bad}"] for good, bad in zip(sentences[::2], sentences[1::2], strict=True)
        )
        / (len(sentences) // 2)
        for task, sentences in tasks.items()
    }


def _sentences(file: Path) -> list[str]:
    """Return the sentences of a file, a good one and a bad one in turn."""
    return [json.loads(line)[key] for line in file.read_text().splitlines() for key in (GOOD, BAD)]
