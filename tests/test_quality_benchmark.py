"""The benchmark of quality: rows that are shared by processes, that come from another machine, and that fail."""

import json
import random
import re
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality import __main__ as quality
from benchmarks.quality import jobs, measuring
from tests.support.tiny import GROUPED, make_model
from tests.support.words import WORDS, words_tokenizer

SMALL = ("--samples", "2", "--seqlen", "16", "--eval-windows", "2", "--settings", "0.5")
TEXT = ("constraints.txt", "own=self")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "model"
    name, values = GROUPED["llama"]
    make_model(folder, "llama", configs={"llama": (name, values)})
    words_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(out, model, *words):
        case = ("--case", str(model), *TEXT)
        monkeypatch.setattr(sys, "argv", ["quality", "--out", str(out), *SMALL, *words, *case])
        quality.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def measured(monkeypatch):
    """The recipes of the rows that are measured in this process."""
    recipes = []
    prune = measuring.prune
    monkeypatch.setattr(
        measuring, "prune", lambda recipe, reporter: (recipes.append(recipe), prune(recipe, reporter))[1]
    )
    return recipes


@pytest.mark.long
def test_rows_of_several_processes_are_those_of_one_and_count_on_another_machine(
    run, measured, tiny, tmp_path, monkeypatch
):
    rows = ("--only", "*/Wanda", "*/quality fast")
    by_two = run(tmp_path / "out", tiny, *rows, "--jobs", "2")
    assert measured == []  # in this process
    shutil.copytree(tmp_path / "out", tmp_path / "there" / "out")
    shutil.copytree(tiny, tmp_path / "there" / "model")
    assert run(tmp_path / "there" / "out", tmp_path / "there" / "model", *rows) == by_two
    assert run(tmp_path / "there" / "out", tmp_path / "there" / "model", *rows, "--there") == by_two
    assert measured == []
    alone = run(tmp_path / "alone", tiny, *rows)
    seconds = re.compile(r"\| \d+\.\d\d \|")
    assert seconds.sub("", alone) == seconds.sub("", by_two)
    assert len(measured) == 2  # SparseGPT and Wanda: the fast recipe is SparseGPT's


def test_only_what_is_there_is_printed_where_nothing_is_to_be_measured(run, measured, tiny, tmp_path):
    assert run(tmp_path, tiny, "--there") == ""
    run(tmp_path, tiny, "--only", "*/Wanda")
    measured.clear()
    rows = re.findall(r"^\| ([A-Z][^|]*?) \|", run(tmp_path, tiny, "--there"), re.MULTILINE)
    assert (rows, measured) == (["SparseGPT", "Wanda"], [])


def test_a_row_that_fails_is_named_and_the_others_go_on(run, tiny, tmp_path, monkeypatch, capsys):
    measure = jobs.Measurer.measure

    def failing(self, text, setting, recipe):
        if recipe.get("method") == "wanda":
            raise RuntimeError("no\nmemory")
        return measure(self, text, setting, recipe)

    monkeypatch.setattr(jobs.Measurer, "measure", failing)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, tiny, "--only", "*/Wanda", "*/OWL")
    printed = capsys.readouterr().out
    assert end.value.code == 1
    assert "model/own/0.5/Wanda: failed, RuntimeError: no memory\n" in printed
    assert "| OWL |" in printed
    assert "| Wanda |" not in printed


def test_pairs_of_sentences_have_lm_evals_accuracies(run, tiny, tmp_path):
    """In the same order of likelihoods as its own model's, computed sentence by sentence here."""
    tokenizer, drawing = words_tokenizer(), random.Random(0)
    sentences = [" ".join(drawing.choices(WORDS[3:], k=4)) for _ in range(20)]
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for task, own in (("one", sentences[:12]), ("two", sentences[12:])):
        lines = [
            json.dumps({"sentence_good": good, "sentence_bad": bad})
            for good, bad in zip(own[::2], own[1::2], strict=True)
        ]
        (pairs / f"{task}.jsonl").write_text("\n".join(lines))
    printed = run(tmp_path / "out", tiny, "--only", "*/SparseGPT", "--pairs", str(pairs))
    assert run(tmp_path / "out", tiny, "--only", "*/SparseGPT", "--pairs", str(pairs), "--there") == printed

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def likelihood(sentence: str) -> float:
        tokens = torch.tensor([[first, *tokenizer(f" {sentence}", add_special_tokens=False).input_ids]])
        with torch.no_grad():
            logs = model(tokens).logits.log_softmax(-1)
        return float(logs[0, :-1].gather(1, tokens[0, 1:, None]).sum())

    better = [likelihood(good) > likelihood(bad) for good, bad in zip(sentences[::2], sentences[1::2], strict=True)]
    one, two = (100 * sum(own) / len(own) for own in (better[:6], better[6:]))
    assert 0 < one + two < 200
    assert "| accuracy, % | mean | one | two |" in printed
    assert f"| dense | {(one + two) / 2:.1f} | {one:.1f} | {two:.1f} |" in printed
    assert re.search(r"^\| SparseGPT \| \d+\.\d \| \d+\.\d \| \d+\.\d \|$", printed, re.MULTILINE)


def test_what_a_process_that_was_killed_has_left_is_removed(run, tiny, tmp_path):
    left = tmp_path / "model" / "run-4194304"  # above the highest number of a process
    left.mkdir(parents=True)
    run(tmp_path, tiny, "--only", "*/SparseGPT")
    assert not list((tmp_path / "model").glob("run-*"))


def test_a_warm_up_before_the_rows_is_no_row(run, measured, tiny, tmp_path, monkeypatch):
    carry_out = quality.carry_out
    monkeypatch.setattr(quality, "carry_out", lambda rows, n, _: carry_out(rows, n, rows[0].measurer.warm_up))
    rows = re.findall(r"^\| ([A-Z][^|]*?) \|", run(tmp_path, tiny, "--only", "*/SparseGPT"), re.MULTILINE)
    assert rows == ["SparseGPT"]
    assert [(recipe.method, recipe.allocation) for recipe in measured] == [
        ("alps", "fisher"),
        ("sparsegpt", "uniform"),
    ]
