"""Tokenizers that are damaged, or that belong to another model."""

import json
import threading
from pathlib import Path

import pytest

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.tokenizer import check_ends
from shardprune.storage import tokenising
from shardprune.storage.tokenising import tokenise
from shardprune.storage.windows import calibration_windows, perplexity_windows
from tests.support.words import WORDS, words_tokenizer


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("limit", ["x", 0, -5, True])
def test_a_limit_that_is_no_length_is_refused(copy, limit):
    change(copy / "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(
        InputError, match=rf"^model: .*tokenizer_config\.json: model_max_length is {limit!r}; use a pos"
    ):
        Checkpoint(str(copy)).tokenizer()


def test_a_pattern_that_backtracks_is_refused(copy):
    pattern = {"type": "Split", "pattern": {"Regex": r"(a+)+\z"}, "behavior": "Isolated", "invert": False}
    change(copy / "tokenizer.json", pre_tokenizer=pattern)
    with pytest.raises(InputError, match=r"^model: the tokenizer fails with a trial text \(.*\): .*Onig"):
        Checkpoint(str(copy)).tokenizer()


def test_a_tokenizer_that_does_not_end_is_left_behind(monkeypatch):
    monkeypatch.setattr(tokenising, "LEAST", 0.05)
    never = threading.Event()
    with pytest.raises(InputError, match=r"^eval: the tokenizer does not end with 'x\.txt': 100 characters in"):
        tokenise(never.wait, 100, "eval", "'x.txt'")
    never.set()


@pytest.mark.parametrize("damage", [{"model": {"type": "BPE"}}, {"model": 5}, {"added_tokens": "x"}], ids=str)
def test_a_damaged_tokenizer_is_one_line(copy, damage):
    change(copy / "tokenizer.json", **damage)
    with pytest.raises(InputError, match=r"^model: .* holds no tokenizer that loads: ") as caught:
        Checkpoint(str(copy)).tokenizer()
    assert "\n" not in str(caught.value)
    assert "/tmp/tmp" not in str(caught.value)


@pytest.mark.parametrize("documents", [False, True], ids=["text", "documents"])
def test_tokens_that_the_model_does_not_know_are_refused(tmp_path, documents):
    text = " ".join(WORDS[3:]) * 3
    source = tmp_path / ("x.jsonl" if documents else "x.txt")
    source.write_text(json.dumps({"text": text}) if documents else text)
    wrong = rf"the tokenizer makes token {len(WORDS) - 1} of .*x.*; the model has 9$"
    with pytest.raises(InputError, match=f"^calibration: {wrong}"):
        calibration_windows(str(source), words_tokenizer, 2, 4, 0, vocabulary=9)
    with pytest.raises(InputError, match=f"^perplexity: {wrong}"):
        perplexity_windows(str(source), words_tokenizer, 4, 9, None, "perplexity")
    assert calibration_windows(str(source), words_tokenizer, 2, 4, 0, vocabulary=10).shape == (2, 4)


def test_a_tokenizer_without_ends_is_refused_for_tasks():
    tokenizer = words_tokenizer()
    check_ends(tokenizer, "model", writes=True)
    tokenizer.eos_token = None
    check_ends(tokenizer, "model")
    with pytest.raises(InputError, match="^model: its tokenizer has no token that ends a text"):
        check_ends(tokenizer, "model", writes=True)
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="^model: its tokenizer has no token that begins or ends a text"):
        check_ends(tokenizer, "model")
