"""From every kind of source to rows, token by token."""

import json
from itertools import pairwise

import fsspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shardprune.errors import InputError
from shardprune.recovery.examples import check_data, load_rows
from shardprune.storage import stdlib
from tests.conftest import SHARED
from tests.support.words import words_tokenizer

VOCABULARY = 300
BOS, EOS = 256, 257  # of the tokenizer of bytes
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "Add.\n"
    "\n"
    "### Input:\n"
    "1 {and} 2\n"
    "\n"
    "### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
    "\n"
    "### Instruction:\n"
    "Say ä.\n"
    "\n"
    "### Response:\n"
)
ADD = {"instruction": "Add.", "input": "1 {and} 2", "output": "3"}
SAY = {"instruction": "Say ä.", "input": "", "output": "ä"}


def bytes_tokenizer(bos=True, eos=False, merges=()):
    """One token a byte (its id the byte), and one for each merge of two; optionally adds BOS and EOS itself."""
    alphabet = bytes_to_unicode()
    vocabulary = {symbol: byte for byte, symbol in alphabet.items()} | {"<s>": BOS, "</s>": EOS}
    pairs = [tuple(alphabet[byte] for byte in merge.encode()) for merge in merges]
    vocabulary |= {left + right: 258 + index for index, (left, right) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    template = "<s> " * bos + "$A" + " </s>" * eos
    special = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def load(source, tokenizer=None, length=1000, packing=False, prompt_loss=False):
    made = tokenizer or bytes_tokenizer()
    return load_rows(str(source), lambda: made, length, packing, prompt_loss, VOCABULARY)


def write(path, *values):
    path.write_text(json.dumps(values) if path.suffix == ".json" else "\n".join(map(json.dumps, values)))
    return path


def tokens_of(rows):
    return [rows.row(index).tokens.tolist() for index in range(len(rows))]


def learned_of(rows):
    """The learned tokens of every row."""
    return [rows.row(index).tokens[rows.row(index).learned].tolist() for index in range(len(rows))]


def words(text):
    return words_tokenizer()(text).input_ids


# -- instructions ---------------------------------------------------------------------------------------------


def test_prompts_are_alpacas_and_responses_alone_are_learned(tmp_path):
    rows = load(write(tmp_path / "x.json", ADD, SAY))
    assert tokens_of(rows) == [
        [BOS, *WITH_INPUT.encode(), ord("3"), EOS],
        [BOS, *WITHOUT_INPUT.encode(), 0xC3, 0xA4, EOS],
    ]
    assert learned_of(rows) == [[ord("3"), EOS], [0xC3, 0xA4, EOS]]
    assert rows.row(0).learned.tolist() == [False] * (1 + len(WITH_INPUT)) + [True, True]
    assert rows.row(1).positions.tolist() == list(range(len(WITHOUT_INPUT.encode()) + 4))


@pytest.mark.parametrize("missing", [{}, {"input": None}])
def test_input_may_be_absent(tmp_path, missing):
    value = {"instruction": SAY["instruction"], "output": SAY["output"], **missing}
    assert tokens_of(load(write(tmp_path / "x.json", value))) == tokens_of(load(write(tmp_path / "y.json", SAY)))


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("prompt_loss", [False, True])
def test_special_tokens_are_there_once(tmp_path, bos, eos, prompt_loss):
    rows = load(write(tmp_path / "x.json", ADD), bytes_tokenizer(bos, eos), prompt_loss=prompt_loss)
    tokens = [*[BOS] * bos, *WITH_INPUT.encode(), ord("3"), EOS]
    assert tokens_of(rows) == [tokens]
    assert learned_of(rows) == [tokens[1:] if prompt_loss else [ord("3"), EOS]]


def test_a_tokenizer_without_an_end(tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.eos_token = None
    rows = load(write(tmp_path / "x.json", ADD), tokenizer)
    assert tokens_of(rows) == [[BOS, *WITH_INPUT.encode(), ord("3")]]
    assert learned_of(rows) == [[ord("3")]]


def test_a_token_across_the_border_is_learned(tmp_path):
    rows = load(write(tmp_path / "x.json", ADD), bytes_tokenizer(merges=["\n3"]))
    assert tokens_of(rows) == [[BOS, *WITH_INPUT.encode()[:-1], 258, EOS]]
    assert learned_of(rows) == [[258, EOS]]


def test_an_empty_response_is_an_end(tmp_path):
    assert learned_of(load(write(tmp_path / "x.json", {**ADD, "output": ""}))) == [[EOS]]


def test_truncation_drops_what_has_nothing_left_to_learn(tmp_path):
    path = write(tmp_path / "x.json", ADD, {**SAY, "output": "long enough"})
    border = 1 + len(WITHOUT_INPUT.encode())
    assert border + 4 <= len(WITH_INPUT)
    assert learned_of(load(path, length=border + 4)) == [list(b"long")]
    rows = load(path, length=border + 4, prompt_loss=True)
    assert tokens_of(rows)[0] == [BOS, *WITH_INPUT.encode()[: border + 3]]
    assert [len(tokens) for tokens in tokens_of(rows)] == [border + 4] * 2
    with pytest.raises(InputError, match="data: .*x.json' has no tokens left to learn at length 9; use a longer"):
        load(path, length=9)


def test_a_tokenizer_without_offsets(tmp_path):
    class Slow:
        is_fast = False
        eos_token_id = None

        def __call__(self, texts, return_offsets_mapping, verbose):
            assert not return_offsets_mapping
            return {"input_ids": [[1, 2, 3] for _ in texts]}

    path = write(tmp_path / "x.json", ADD)
    with pytest.raises(InputError, match="data: .*x.json' needs a fast tokenizer to tell responses from prompts"):
        load(path, Slow())
    assert tokens_of(load(path, Slow(), prompt_loss=True)) == [[1, 2, 3]]


def test_many_instructions_keep_their_order(tmp_path):
    values = [{**ADD, "output": str(number)} for number in range(2100)]
    learned = learned_of(load(write(tmp_path / "x.json", *values)))
    assert [bytes(tokens[:-1]).decode() for tokens in learned] == [str(number) for number in range(2100)]


def test_instructions_of_other_forms(tmp_path):
    expected = tokens_of(load(write(tmp_path / "x.json", ADD, SAY)))
    assert tokens_of(load(write(tmp_path / "x.jsonl", ADD, SAY))) == expected
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", ADD, SAY)
    assert tokens_of(load(f"hf:{tmp_path / 'data'}:train:alpaca")) == expected


def test_published_instructions():
    path = SHARED / "data" / "gsm8k-alpaca.json"
    model = SHARED / "models" / "english-4m"
    if not path.is_file() or not model.is_dir():
        pytest.skip("shared material is absent")
    tokenizer = AutoTokenizer.from_pretrained(model)
    values = json.loads(path.read_text())[:200]
    fsspec.filesystem("memory").pipe("/gsm8k.json", json.dumps(values).encode())
    rows = load_rows("memory://gsm8k.json", lambda: tokenizer, 2048, False, False, len(tokenizer))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in learned_of(rows)]
    assert texts == [value["output"] for value in values]


# -- texts ----------------------------------------------------------------------------------------------------


def test_a_text_is_cut_as_one_stream(tmp_path):
    (tmp_path / "x.txt").write_text("one two three four five six seven")
    rows = load(tmp_path / "x.txt", words_tokenizer(), length=3)  # the last row would have one token
    assert tokens_of(rows) == [words("one two three"), words("four five six")]
    assert learned_of(rows) == [words("two three"), words("five six")]
    rows = load(tmp_path / "x.txt", words_tokenizer(), length=5)
    assert tokens_of(rows) == [words("one two three four five"), words("six seven")]


DOCUMENTS = [{"text": "one two", "body": "six", "n": 1}, {"text": " "}, {"text": "three four five", "body": "seven"}]
END = words_tokenizer().eos_token_id


def test_documents_end_and_are_cut_one_by_one(tmp_path):
    expected = [[*words("one two"), END], [*words("three four five"), END]]
    path = write(tmp_path / "x.jsonl", *DOCUMENTS)
    assert tokens_of(load(path, words_tokenizer())) == expected
    assert tokens_of(load(f"hf:{tmp_path}:train:text", words_tokenizer())) == expected
    rows = load(path, words_tokenizer(), length=2)  # the end of the first is a piece of one token
    assert tokens_of(rows) == [words("one two"), words("three four"), [*words("five"), END]]


def test_a_field_of_a_document(tmp_path):
    path = write(tmp_path / "x.jsonl", DOCUMENTS[0], DOCUMENTS[2])
    assert tokens_of(load(f"{path}:body", words_tokenizer())) == [[*words("six"), END], [*words("seven"), END]]
    assert tokens_of(load(f"{write(tmp_path / 'y.jsonl', SAY)}:output")) == [[BOS, 0xC3, 0xA4, EOS]]


def test_the_standard_library(monkeypatch):
    monkeypatch.setattr(stdlib, "documents", lambda split: {"train": ["one two", "three"]}[split])
    assert tokens_of(load("stdlib", words_tokenizer())) == [[*words("one two"), END], [*words("three"), END]]


def test_any_file_system():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/a.json": json.dumps([ADD]).encode(), "/a.txt": b"ab", "/a.jsonl": json.dumps(ADD).encode()})
    assert learned_of(load("memory://a.json")) == learned_of(load("memory://a.jsonl")) == [[ord("3"), EOS]]
    assert tokens_of(load("memory://a.txt")) == [[BOS, *b"ab"]]


def test_stored_tokens_are_used_as_they_are(tmp_path):
    tokens = np.arange(12, dtype=np.int64).reshape(3, 4)
    np.save(tmp_path / "x.npy", tokens)
    rows = load(tmp_path / "x.npy", length=4)
    assert tokens_of(rows) == tokens.tolist()
    assert rows.learned.tolist() == [False, True, True, True] * 3
    assert rows.tokens.dtype == torch.int32


# -- packing --------------------------------------------------------------------------------------------------


def test_packed_rows_hold_each_example_once(tmp_path):
    values = [{**(ADD if n % 3 else SAY), "output": str(n) * (n % 90)} for n in range(100)]
    path = write(tmp_path / "x.json", *values)
    alone, packed = load(path, length=700), load(path, length=700, packing=True)
    found = []
    for index in range(len(packed)):
        tokens, learned, positions = packed.row(index)
        assert len(tokens) <= 700
        first = [*torch.where(positions == 0)[0].tolist(), len(tokens)]
        for start, end in pairwise(first):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((tokens[start:end].tolist(), learned[start:end].tolist()))
    rows = [alone.row(index) for index in range(len(alone))]
    assert sorted(found) == sorted((row.tokens.tolist(), row.learned.tolist()) for row in rows)
    assert len(packed) < len(alone) == 100
    assert len(packed.tokens) > 700 * len(packed) / 2
    assert packed.digest() == load(path, length=700, packing=True).digest()


# -- bad input ------------------------------------------------------------------------------------------------


NO_OUTPUT = {"instruction": "x"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", json.dumps([ADD, SAY, NO_OUTPUT]), "x.json' row 3 has no text 'output'"),
        ("x.json", json.dumps([ADD, {**ADD, "instruction": 5}]), "x.json' row 2 has no text 'instruction'"),
        ("x.json", json.dumps([{**ADD, "input": ["a"]}]), "x.json' row 1 has no text 'input'"),
        ("x.json", json.dumps([{**ADD, "output": "half a pair: \ud800"}]), "x.json' is not JSON: .* hex escape"),
        ("x.json", json.dumps([ADD, "text"]), "x.json' row 2 is no object with instruction, input and output"),
        ("x.json", json.dumps(ADD), "x.json' is no JSON list of objects"),
        ("x.json", "{", "x.json' is not JSON"),
        ("x.json", "", "x.json' is empty"),
        ("x.json", "[]", "x.json' is empty"),
        ("x.json", b"\xff", "x.json' is not UTF-8 text"),
        ("x.json", None, "x.json' does not exist"),
        ("x.jsonl", f"{json.dumps(ADD)}\n\n{json.dumps(NO_OUTPUT)}", "x.jsonl' line 3 has no text 'output'"),
        ("x.jsonl", f"{json.dumps(ADD)}\n{{", "x.jsonl' line 2 is not JSON: EOF"),
        ("x.jsonl", '{"text": "a"}\n{"txt": "b"}', "x.jsonl' line 2 is no JSON object with a text 'text'"),
        ("x.jsonl", '{"text": "\\ud800"}', "x.jsonl' line 1 is not JSON: .* hex escape"),
        ("x.jsonl:body", '{"text": "a"}', "x.jsonl' line 1 is no JSON object with a text 'body'"),
        ("x.jsonl", "\n \n", "x.jsonl' is empty"),
        ("x.txt", " \n", "x.txt' is empty"),
        ("x.txt", None, "x.txt' does not exist"),
        ("x.npy", "no array", "x.npy' is not a .npy array"),
        ("x.csv", "a", "x.csv' is no known source; use alpaca, FILE.json"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    if content is not None:
        file = tmp_path / name.split(":")[0]
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"^data: .*{message}") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((5, 6)), "is float64"),
        (np.zeros((0, 6), dtype=np.int64), "is empty"),
        (np.zeros((2, 7), dtype=np.int64), "has rows of 7 tokens, not of length 6"),
        (np.full((2, 6), VOCABULARY, dtype=np.int64), "must hold token ids from 0 to 299"),
        (np.full((2, 6), 2**32, dtype=np.int64), "must hold token ids from 0 to 299"),
        (np.full((2, 6), -1, dtype=np.int64), "must hold token ids from 0 to 299"),
    ],
)
def test_bad_stored_tokens(tmp_path, tokens, message):
    np.save(tmp_path / "x.npy", tokens)
    with pytest.raises(InputError, match=f"data: .*x.npy' {message}"):
        load(tmp_path / "x.npy", length=6)


def test_a_tokenizer_of_another_model(tmp_path):
    path = write(tmp_path / "x.json", ADD)
    with pytest.raises(InputError, match="data: the tokenizer makes token 257 of .*; the model has 200"):
        load_rows(str(path), bytes_tokenizer, 1000, False, False, 200)


def test_data_sets_that_do_not_fit(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a", "output": "b"}\n{"text": null, "output": "b"}')
    with pytest.raises(InputError, match="data: .* has no field 'instruction'; use one of text, output"):
        load(f"hf:{tmp_path / 'data'}:train:alpaca")
    with pytest.raises(InputError, match="data: .* row 2 is no text"):
        load(f"hf:{tmp_path / 'data'}:train:text")
    with pytest.raises(InputError, match="data: 'alpaca' cannot be loaded as a data set"):
        load("alpaca")  # no hub in tests


def test_no_credentials_in_errors():
    with pytest.raises(InputError) as caught:
        check_data("https://me:secret@host/x.json?token=secret")
    assert "secret" not in str(caught.value)


FORMS = ["alpaca", "x.json", "s3://b/x.jsonl", "x.jsonl:text", "x.txt", "x.npy", "stdlib", "wikitext2", "ptb", "c4"]


@pytest.mark.parametrize("source", [*FORMS, "hf:a/b:train:alpaca", "hf:a/b:config:train:text"])
def test_known_forms(source):
    check_data(source)


@pytest.mark.parametrize("source", ["", "gsm8k", "x.csv", "x.json:text", "x.jsonl:", "hf:a/b", "alpaca:train"])
def test_unknown_forms(source):
    with pytest.raises(InputError, match="data: .* is no known source; use alpaca, FILE.json"):
        check_data(source)
