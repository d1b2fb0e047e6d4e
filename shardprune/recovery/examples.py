"""Training data: from a source to rows of tokens.

FILE.json                     instructions in Alpaca's form: a JSON list of objects with the texts `instruction`,
                              `input` (may be absent or empty) and `output`; or conversations about images in
                              LLaVA's form (see `shardprune.recovery.conversations`)
FILE.jsonl[:FIELD]            one object per line: without FIELD, instructions if the first line has an
                              `instruction`, else a document's text in `text`
FILE.txt                      one text
FILE.npy                      int64 token ids [rows, length], used as they are
alpaca                        Alpaca's instructions as cleaned by yahma, from the hub
stdlib, c4                    documents, as for calibration
wikitext2, ptb                one text, as for calibration
hf:NAME[:CONFIG]:SPLIT:FIELD  the texts in one column of any data set; if FIELD is `alpaca`, instructions
                              in the columns `instruction`, `input` and `output`

FILE may be a path or any URL that fsspec reads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shardprune.errors import InputError
from shardprune.recovery.conversations import Conversations, Eyes, conversation, is_conversation
from shardprune.recovery.row_images import ImageFile
from shardprune.recovery.rows import Example, Rows, pack
from shardprune.storage.json_file import parse_json
from shardprune.storage.malformed import located
from shardprune.storage.sources import (
    Corpus,
    HubSplit,
    check_data,
    is_tokens,
    json_texts,
    load_corpus,
    load_hub,
    load_tokens,
    parse_hub,
    read_json_lines,
    read_text,
    split_jsonl,
)
from shardprune.storage.tokenising import check_vocabulary, tokenise
from shardprune.storage.windows import Tokenizer

ALPACA = HubSplit("yahma/alpaca-cleaned", None, "train", "alpaca")
BATCH = 1000  # texts per call of the tokenizer, which processes them in parallel

# Alpaca's two templates, with the line break after the last heading that alpaca-lora gives them.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

T = TypeVar("T")


class Exchange(NamedTuple):
    """An instruction formatted as a prompt, and the response to learn."""

    prompt: str
    response: str


def load_rows(
    source: str,
    tokenizer: Tokenizer,
    length: int,
    packing: bool,
    prompt_loss: bool,
    vocabulary: int,
    eyes: Eyes | None = None,
) -> Rows:
    """Load the rows of a source, each of at most `length` tokens, in the source's order unless packed.

    An instruction is one example: prompt, response and end-of-sequence token, truncated to `length`. A document is
    tokenised, ended by the end-of-sequence token and cut into examples of `length`; a text is cut as one stream.
    Examples without a learned token are left out, such as an instruction whose response starts beyond `length`.

    Args:
        packing: put several short examples into one row.
        prompt_loss: learn the tokens of prompts, too; those of documents and texts are always learned.
        vocabulary: the number of tokens of the model.
        eyes: of a model that sees images; None: it sees none.

    Raises:
        InputError: the source has no known form, is missing, does not have the form that its name implies, or has
            nothing to learn; or the tokenizer does not fit. Names `data`.
    """
    check_data(source)
    files: list[ImageFile] = []
    if is_tokens(source):
        examples = _stored(source, length, vocabulary)
    else:
        content = _read(source)
        if isinstance(content, Conversations):
            if eyes is None:
                raise InputError("data", f"{source!r} holds conversations about images, and the model sees none")
            if packing:
                raise InputError("packing", f"puts no conversations about images into one row, as in {source!r}")
            made: Iterable[Example]
            made, files = eyes.read(content, source, length, prompt_loss)
        elif isinstance(content, list):
            made = _from_exchanges(source, content, tokenizer(), length, prompt_loss)
        else:
            made = _from_corpus(source, content, tokenizer(), length)
        examples = [example for example in made if example.learned[1:].any()]
        if not examples:
            raise InputError("data", f"{source!r} has no tokens left to learn at length {length}; use a longer length")
    sizes = [len(example.tokens) for example in examples]
    groups = pack(sizes, length) if packing else [[index] for index in range(len(examples))]
    rows = Rows.of([[examples[index] for index in group] for group in groups], files)
    check_vocabulary(int(rows.tokens.max()), vocabulary, "data", repr(source))
    return rows


# -- what a source holds ----------------------------------------------------------------------------------


def _read(source: str) -> list[Exchange] | Conversations | Corpus:
    """Read a source as instructions, as conversations, or as texts."""
    if source == "alpaca":
        return _hub_exchanges(source, ALPACA)
    if source.startswith("hf:") and (hub := parse_hub(source)).field == "alpaca":
        return _hub_exchanges(source, hub)
    if source.endswith(".json"):
        return _json_exchanges(source)
    if parts := split_jsonl(source):
        url, field = parts
        lines = read_json_lines("data", url)
        if field is None and lines and isinstance(lines[0][1], dict) and "instruction" in lines[0][1]:
            return [_exchange(f"{source!r} line {number}", value) for number, value in lines]
        return Corpus(json_texts("data", url, lines, field or "text"), by_document=True)
    corpus = load_corpus("data", source, "calibration")
    # Rows of wikitext2 and ptb are lines of one text; those of any other data set are documents.
    return replace(corpus, by_document=True) if source.startswith("hf:") else corpus


def _json_exchanges(source: str) -> list[Exchange] | Conversations:
    text = read_text("data", source)
    if not text.strip():
        raise InputError("data", f"{source!r} is empty")
    with located("data", repr(source)):
        values = parse_json(text, limit=len(text))
    if not isinstance(values, list):
        raise InputError("data", f"{source!r} is no JSON list of objects with instruction, input and output")
    if values and is_conversation(values[0]):
        return Conversations(conversation(f"{source!r} row {number}", value) for number, value in enumerate(values, 1))
    return [_exchange(f"{source!r} row {number}", value) for number, value in enumerate(values, 1)]


def _hub_exchanges(source: str, hub: HubSplit) -> list[Exchange]:
    rows = load_hub("data", source, hub, ["instruction", "output"])
    return [_exchange(f"{source!r} row {number}", value) for number, value in enumerate(rows.to_list(), 1)]


def _exchange(where: str, value: Any) -> Exchange:
    if not isinstance(value, dict):
        raise InputError("data", f"{where} is no object with instruction, input and output")
    texts: dict[str, Any] = {name: value.get(name) for name in ("instruction", "input", "output")}
    if texts["input"] is None:
        texts["input"] = ""
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError("data", f"{where} has no text {name!r}")
    template = PROMPT_WITH_INPUT if texts["input"] else PROMPT
    return Exchange(template.format(instruction=texts["instruction"], input=texts["input"]), texts["output"])


# -- examples ---------------------------------------------------------------------------------------------


def _from_exchanges(
    source: str, exchanges: list[Exchange], tokenizer: PreTrainedTokenizerBase, length: int, prompt_loss: bool
) -> Iterator[Example]:
    if not exchanges:
        raise InputError("data", f"{source!r} is empty")
    if not prompt_loss and not tokenizer.is_fast:
        raise InputError("data", f"{source!r} needs a fast tokenizer to tell responses from prompts")
    for batch in _batches(exchanges):
        texts = [exchange.prompt + exchange.response for exchange in batch]
        encoded = tokenise(
            partial(tokenizer, texts, return_offsets_mapping=not prompt_loss, verbose=False),
            sum(map(len, texts)),
            "data",
            repr(source),
        )
        for index, (exchange, ids) in enumerate(zip(batch, encoded["input_ids"], strict=True)):
            learned = torch.ones(len(ids), dtype=torch.bool)
            if not prompt_loss:
                # Tokens that the tokenizer adds have no offsets in the text; one across prompt and response is learned.
                ends = torch.tensor([end for _, end in encoded["offset_mapping"][index]], dtype=torch.int64)
                learned = ends > len(exchange.prompt)
            tokens, learned = _ended(tokenizer, ids, learned)
            yield Example(tokens[:length], learned[:length])


def _from_corpus(source: str, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[Example]:
    documents = [document for document in corpus.documents if document.strip()]
    if not documents:
        raise InputError("data", f"{source!r} is empty")
    for batch in _batches(documents if corpus.by_document else [corpus.text]):
        characters = sum(map(len, batch))
        encoded = tokenise(partial(tokenizer, batch, verbose=False), characters, "data", repr(source))
        for ids in encoded["input_ids"]:
            tokens, learned = _tensor(ids), torch.ones(len(ids), dtype=torch.bool)
            if corpus.by_document:
                tokens, learned = _ended(tokenizer, ids, learned)
            yield from map(Example, tokens.split(length), learned.split(length))


def _ended(tokenizer: PreTrainedTokenizerBase, ids: list[int], learned: Tensor) -> tuple[Tensor, Tensor]:
    """Append the end-of-sequence token, if the tokenizer has one, as a learned token."""
    end = tokenizer.eos_token_id
    if end is None:
        return _tensor(ids), learned
    text = ids[:-1] if ids and ids[-1] == end else ids
    return _tensor([*text, end]), torch.cat([learned[: len(text)], torch.ones(1, dtype=torch.bool)])


def _stored(source: str, length: int, vocabulary: int) -> list[Example]:
    tokens = torch.from_numpy(load_tokens("data", source, vocabulary))
    if tokens.shape[1] != length:
        raise InputError("data", f"{source!r} has rows of {tokens.shape[1]} tokens, not of length {length}")
    return [Example(row, torch.ones(length, dtype=torch.bool)) for row in tokens.int()]


def _tensor(ids: Iterable[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]
