"""Local paths in the files of an output."""

import os

import pytest

from shardprune.storage.relative_paths import absolute_paths, relative_paths

CONTENT = {
    "recipe": {"model": "/data/llama", "out": "/data/runs/half", "eval": ["/data/a.jsonl:text", "wikitext2"], "n": 1},
    "perplexity": {"/data/runs/half/own.txt": {"before": 2.5}},
}
RELATIVE = {
    "recipe": {"model": "../../llama", "out": ".", "eval": ["../../a.jsonl:text", "wikitext2"], "n": 1},
    "perplexity": {"./own.txt": {"before": 2.5}},
}


def test_paths_become_relative_to_the_output_and_absolute_again():
    assert relative_paths(CONTENT, "/data/runs/half") == RELATIVE
    assert absolute_paths(RELATIVE, "/data/runs/half") == CONTENT
    assert absolute_paths(RELATIVE, "/b/runs/half")["recipe"]["model"] == "/b/llama"


@pytest.mark.parametrize("name", ["group/model", "s3://bucket/a", "hf:a:b:c", "texts/a.txt", "mlp.down_proj", "", ".x"])
def test_names_and_urls_stay(name):
    assert relative_paths(name, "/data/out") == absolute_paths(name, "/data/out") == name


def test_other_ways_to_write_a_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert relative_paths("../model", "out") == "../../model"
    assert relative_paths("~/model", "/home/me/runs/a") == "../../model"
    assert relative_paths("file:///a/model", "/a/b") == "../model"
    assert absolute_paths(relative_paths("./x", "out"), "out") == os.path.join(tmp_path, "x")


def test_of_an_output_on_other_storage_the_name_alone_stays():
    assert relative_paths(CONTENT, "s3://bucket/half")["recipe"]["model"] == "llama"
    assert absolute_paths(RELATIVE, "s3://bucket/half") == RELATIVE


def test_of_an_output_on_other_storage_names_that_are_alike_stay_apart():
    texts = {"/data/a/x.txt": 1, "/data/b/x.txt": 2, "/data/c/b/x.txt": 3, "x.txt": 4}
    assert relative_paths(texts, "s3://bucket/half") == {"x.txt": 1, "b/x.txt": 2, "c/b/x.txt": 3, "x.txt (2)": 4}


def test_what_models_write_is_no_path():
    written = {"continuations": [{"prompt": "/data/llama", "before": "~5 and more", "after": "./x"}]}
    assert relative_paths(written, "/data/runs/half") == absolute_paths(written, "/data/runs/half") == written
