"""Windows from every kind of source."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from shardprune.errors import InputError
from shardprune.storage import stdlib, windows
from shardprune.storage.sources import check_source
from shardprune.storage.windows import calibration_windows, perplexity_windows, tokens_hash
from tests.support.words import words_tokenizer

SENTENCE = "one two three four five six seven "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    words_tokenizer().save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    return lambda: loaded


def calibrate(source, tokenizer, samples=4, seqlen=6, seed=0):
    return calibration_windows(str(source), tokenizer, samples, seqlen, seed, vocabulary=16)


def test_windows_are_drawn_from_the_stream_with_the_seed(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text(SENTENCE * 20)
    stream = tokenizer()(SENTENCE * 20).input_ids
    places = {tuple(stream[start : start + 6]) for start in range(len(stream) - 5)}
    windows = calibrate(tmp_path / "x.txt", tokenizer)
    assert windows.shape == (4, 6)
    assert windows.dtype == torch.int64
    assert {tuple(window.tolist()) for window in windows} <= places
    assert torch.equal(windows, calibrate(tmp_path / "x.txt", tokenizer))
    assert not torch.equal(windows, calibrate(tmp_path / "x.txt", tokenizer, seed=1))


def test_jsonl_documents_and_fields(tmp_path, tokenizer):
    lines = [json.dumps({"text": "one two three", "body": "four five six"})] * 5
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    one, two, three, four = tokenizer()("one two three four").input_ids
    assert set(calibrate(tmp_path / "x.jsonl", tokenizer).flatten().tolist()) == {one, two, three}
    assert four in calibrate(f"{tmp_path / 'x.jsonl'}:body", tokenizer).flatten().tolist()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, encoding):
    (tmp_path / "x.txt").write_text(SENTENCE * 20)
    (tmp_path / "marked.txt").write_text(SENTENCE * 20, encoding=encoding)
    assert torch.equal(calibrate(tmp_path / "marked.txt", tokenizer), calibrate(tmp_path / "x.txt", tokenizer))
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "one two three"}), encoding=encoding)
    assert calibrate(tmp_path / "x.jsonl", tokenizer, seqlen=3).shape == (4, 3)


def test_line_separators_inside_a_json_string_are_text(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "one two\u2028three " * 9}, ensure_ascii=False) + "\n")
    assert calibrate(tmp_path / "x.jsonl", tokenizer).shape == (4, 6)


def test_stored_tokens_are_used_as_they_are(tmp_path, tokenizer):
    tokens = np.arange(30, dtype=np.int64).reshape(5, 6) % 16
    np.save(tmp_path / "x.npy", tokens)
    assert np.array_equal(calibrate(tmp_path / "x.npy", tokenizer).numpy(), tokens[:4])
    assert tokens_hash(torch.from_numpy(tokens)) == tokens_hash(torch.from_numpy(tokens.copy()))


def test_perplexity_windows_do_not_overlap_and_drop_the_rest(tmp_path, tokenizer):
    (tmp_path / "x.txt").write_text(SENTENCE * 3)
    stream = tokenizer()(SENTENCE * 3).input_ids
    windows = perplexity_windows(str(tmp_path / "x.txt"), tokenizer, 6, 16, None)
    assert windows.flatten().tolist() == stream[: len(stream) // 6 * 6]
    assert len(perplexity_windows(str(tmp_path / "x.txt"), tokenizer, 6, 16, 2)) == 2


def test_a_data_set_that_the_library_loads(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"body": "one two three"}) for _ in range(9)))
    windows = calibrate(f"hf:{tmp_path / 'data'}:train:body", tokenizer)
    assert torch.equal(calibrate(f"hf:{tmp_path / 'data'}:train[:100%]:body", tokenizer), windows)
    assert set(windows.flatten().tolist()) == set(tokenizer()("one two three").input_ids)
    with pytest.raises(InputError, match="calibration: .* has no field 'text'; use one of body"):
        calibrate(f"hf:{tmp_path / 'data'}:train:text", tokenizer)


def test_a_data_set_that_is_not_there(tokenizer):
    with pytest.raises(InputError, match="calibration: 'wikitext2' cannot be loaded as a data set"):
        calibrate("wikitext2", tokenizer)


def test_standard_library_splits_are_disjoint_and_stable():
    train = {name for name, _ in stdlib.modules("train")}
    heldout = {name for name, _ in stdlib.modules("heldout")}
    assert train
    assert heldout
    assert not train & heldout
    assert stdlib.split_of("json.decoder") == "train"
    assert stdlib.split_of("pydoc") == "heldout"
    assert not any(name.startswith(("test.", "encodings.")) for name in train | heldout)


def test_stdlib_calibrates_on_training_modules_and_measures_on_held_out_ones(tokenizer):
    from shardprune.storage.sources import load_corpus

    assert load_corpus("calibration", "stdlib", "calibration").documents == stdlib.documents("train")
    assert load_corpus("eval", "stdlib", "perplexity").documents == stdlib.documents("heldout")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"one two", "x.txt", "calibration: .*x.txt' has 2 tokens, too short for one window of seqlen 6"),
        (b"\xff\xfe\x00", "x.txt", "calibration: .* is not UTF-16 text: truncated"),
        (b'{"text": "one"}\n{"txt": "two"}', "x.jsonl", "calibration: .* line 2 is no JSON object with a text 'text'"),
        (rb'{"text": "\ud800"}', "x.jsonl", "calibration: .* line 1 is not JSON: .* hex escape"),
        (b"caf\xe9", "x.txt", "calibration: .* is not UTF-8 text: .* at byte 3"),
        (b'{"text": 5}', "x.jsonl", "calibration: .* line 1 is no JSON object with a text 'text'"),
        (b"not an array", "x.npy", "calibration: .* is not a .npy array"),
        (None, "x.txt", "calibration: .* does not exist"),
    ],
)
def test_bad_sources(tmp_path, tokenizer, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        calibrate(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((5, 6)), "is float64 .* use int64"),
        (np.zeros(6, dtype=np.int64), "use int64"),
        (np.full((5, 6), 16, dtype=np.int64), "must hold token ids from 0 to 15"),
        (np.full((5, 6), -1), "must hold token ids from 0 to 15"),
        (np.zeros((0, 6), dtype=np.int64), "x.npy' is empty"),
        (np.zeros((5, 6), dtype=bool), "is bool .* use int64"),
        (np.zeros((5, 7), dtype=np.int64), "seqlen: 6 is not the row length 7"),
        (np.zeros((3, 6), dtype=np.int64), "samples: 4 is more than the 3 rows"),
    ],
)
def test_bad_stored_tokens(tmp_path, tokenizer, tokens, message):
    np.save(tmp_path / "x.npy", tokens)
    with pytest.raises(InputError, match=message):
        calibrate(tmp_path / "x.npy", tokenizer)


def test_windows_that_memory_has_no_room_for(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "x.txt").write_text(SENTENCE)
    reason = "samples: 1000000000 windows of 6 tokens take 96.0 GB while .* 1.0 GB of them; use at most 10,4"
    monkeypatch.setattr(windows, "host_memory", lambda: 2 * 10**9)
    with pytest.raises(InputError, match=f"^{reason}16,666$"):
        calibrate(tmp_path / "x.txt", tokenizer, samples=10**9)
    with pytest.raises(InputError, match="^samples: 1 windows of .*; use a smaller seqlen$"):
        calibrate(tmp_path / "x.txt", tokenizer, samples=1, seqlen=10**12)


def test_a_data_set_of_rows_without_text(tmp_path, tokenizer):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    with pytest.raises(InputError, match="^calibration: .* row 2 is no text$"):
        calibrate(f"hf:{tmp_path / 'data'}:train:text", tokenizer)


@pytest.mark.parametrize("source", ["stdlib", "c4", "a.txt", "s3://b/a.jsonl:body", "hf:a/b:train:text", "hf:a:b:c:d"])
def test_known_forms(source):
    check_source("calibration", source)


@pytest.mark.parametrize("source", ["", "wikitext", "a.csv", "hf:a", "a.jsonl:"])
def test_unknown_forms(source):
    with pytest.raises(InputError, match="calibration: .* is no known source; use stdlib"):
        check_source("calibration", source)


def test_windows_inside_documents_come_from_long_enough_ones(tokenizer):
    from shardprune.storage.sources import Corpus
    from shardprune.storage.windows import _draw_from_documents

    corpus = Corpus(["one two", "three four five six seven one two", "seven six five four three two"], by_document=True)
    windows = _draw_from_documents(corpus, tokenizer(), 2, 6, 0, "x", 2048)
    streams = [tokenizer()(document).input_ids for document in corpus.documents]
    for window in windows.tolist():
        assert any(window == stream[start : start + 6] for stream in streams for start in range(len(stream) - 5))
    assert len(_draw_from_documents(corpus, tokenizer(), 5, 6, 0, "x", 2048)) == 5  # the long ones over again
    with pytest.raises(InputError, match="calibration: 'x' has no document of 9 tokens"):
        _draw_from_documents(corpus, tokenizer(), 1, 9, 0, "x", 2048)
