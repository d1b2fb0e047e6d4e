"""Sources of text and tokens: files that fsspec reaches, the hub, and Python's standard library.

stdlib                        the running Python's own library: training modules for calibration,
                              held-out modules for perplexity
FILE.txt                      one text
FILE.jsonl[:FIELD]            one document per line, its text in FIELD (default: text)
FILE.npy                      int64 token ids [samples, seqlen], used as they are
wikitext2, ptb, c4            the papers' data sets, from the hub
hf:NAME[:CONFIG]:SPLIT:FIELD  any data set that `datasets.load_dataset` reads by NAME
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from shardprune.errors import InputError, first_line
from shardprune.storage import stdlib
from shardprune.storage.data_files import check_data_files
from shardprune.storage.json_file import parse_json
from shardprune.storage.malformed import located
from shardprune.storage.npy_file import parse_npy
from shardprune.storage.text_file import decode
from shardprune.storage.whole_files import read_file

Role = Literal["calibration", "perplexity"]
BETWEEN = re.compile(r":(?![^\[]*\])")  # the parts of a name on the hub; a split may be a slice such as train[:1%]
FORMS = "stdlib, FILE.txt, FILE.jsonl[:FIELD], FILE.npy, wikitext2, ptb, c4 or hf:NAME[:CONFIG]:SPLIT:FIELD"


@dataclass(frozen=True)
class Corpus:
    """Documents, and the way they are joined into one text.

    Attributes:
        separator: joins the documents.
        by_document: draw each calibration window from one document that is long enough, as the papers do with C4; only
            the drawn documents are tokenised.
        windows: largest number of windows for perplexity; None: all.
    """

    documents: list[str]
    separator: str = "\n\n"
    by_document: bool = False
    windows: int | None = None

    @property
    def text(self) -> str:
        return self.separator.join(self.documents)


@dataclass(frozen=True)
class HubSplit:
    """One split of a hub data set.

    Attributes:
        files: part of the data set to download.
        rows: the first rows only.
        windows: largest number of windows for perplexity; None: all.
    """

    name: str
    config: str | None
    split: str
    field: str
    separator: str = "\n\n"
    files: str | None = None
    rows: int | None = None
    windows: int | None = None
    revision: str | None = None
    by_document: bool = False


# The splits, separators and amounts of SparseGPT's and Wanda's data loaders.
PAPERS: dict[str, dict[Role, HubSplit]] = {
    "wikitext2": {
        "calibration": HubSplit("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text", separator=" "),
        "perplexity": HubSplit("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    },
    "ptb": {
        "calibration": HubSplit(
            "ptb-text-only/ptb_text_only", "penn_treebank", "train", "sentence", " ", revision="refs/convert/parquet"
        ),
        "perplexity": HubSplit(
            "ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence", " ", revision="refs/convert/parquet"
        ),
    },
    "c4": {
        "calibration": HubSplit(
            "allenai/c4", None, "train", "text", files="en/c4-train.00000-of-01024.json.gz", by_document=True
        ),
        "perplexity": HubSplit(
            "allenai/c4", None, "train", "text", " ", "en/c4-validation.00000-of-00008.json.gz", rows=1100, windows=256
        ),
    },
}


def check_source(field: str, source: str) -> None:
    """Check the form of a source without reading it.

    Raises:
        InputError: it is none of the known forms.
    """
    if not is_source(source):
        raise InputError(field, f"{source!r} is no known source; use {FORMS}")


def is_source(source: str) -> bool:
    """Return whether a source has one of the known forms."""
    if source == "stdlib" or source in PAPERS or split_jsonl(source) or source.endswith((".txt", ".npy")):
        return True
    return source.startswith("hf:") and len(BETWEEN.split(source)) in (4, 5)


def is_tokens(source: str) -> bool:
    """Return whether a source holds token ids instead of text."""
    return source.endswith(".npy")


def load_tokens(field: str, source: str, vocabulary: int) -> np.ndarray:
    """Load the int64 token ids [samples, seqlen] of a `.npy` source.

    Raises:
        InputError: it is missing or no such array, is empty, or holds what is no token of the vocabulary.
    """
    with located(field, repr(source)):
        tokens = parse_npy(read_file(source, field), np.int64)
    if tokens.ndim != 2:
        raise InputError(field, f"{source!r} is {tokens.dtype} {[*tokens.shape]}; use int64 [samples, seqlen]")
    if not tokens.size:
        raise InputError(field, f"{source!r} is empty")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise InputError(field, f"{source!r} must hold token ids from 0 to {vocabulary - 1}")
    return tokens


def load_corpus(field: str, source: str, role: Role) -> Corpus:
    """Load the documents of a text source.

    Raises:
        InputError: it is missing, does not have the form that its name implies, or a document is no text.
    """
    if source == "stdlib":
        return Corpus(stdlib.documents("train" if role == "calibration" else "heldout"), by_document=True)
    if source in PAPERS:
        return _hub(field, source, PAPERS[source][role])
    if parts := split_jsonl(source):
        url, text_field = parts
        return Corpus(json_texts(field, url, read_json_lines(field, url), text_field or "text"))
    if source.startswith("hf:"):
        return _hub(field, source, parse_hub(source))
    return Corpus([read_text(field, source)])


def split_jsonl(source: str) -> tuple[str, str | None] | None:
    """Split FILE.jsonl[:FIELD] into URL and field (None if not given); return None for any other source."""
    match = re.fullmatch(r"(.*\.jsonl)(?::([\w.-]+))?", source)
    return (match[1], match[2]) if match else None


def parse_hub(source: str) -> HubSplit:
    """Parse a source hf:NAME[:CONFIG]:SPLIT:FIELD."""
    name, *config, split, text_field = BETWEEN.split(source.removeprefix("hf:"))
    return HubSplit(name, (config or [""])[0] or None, split, text_field)


def read_text(field: str, url: str) -> str:
    """Read a file as text: UTF-8, or what its byte-order mark says.

    Raises:
        InputError: it is missing, too large for this machine's memory, or in no encoding of Unicode.
    """
    with located(field, repr(url)):
        return decode(read_file(url, field))


def read_json_lines(field: str, url: str) -> list[tuple[int, Any]]:
    """Read the JSON values of all non-blank lines with their line numbers (from 1).

    Raises:
        InputError: the file cannot be read as text, or a line is no JSON.
    """
    values = []
    for number, line in enumerate(read_text(field, url).split("\n"), 1):
        if line.strip():
            with located(field, f"{url!r} line {number}"):
                values.append((number, parse_json(line)))
    return values


def json_texts(field: str, url: str, lines: list[tuple[int, Any]], text_field: str) -> list[str]:
    """Extract one text field from the lines that `read_json_lines` returns.

    Raises:
        InputError: a line is no object with such a text.
    """
    documents = []
    for number, value in lines:
        document = value.get(text_field) if isinstance(value, dict) else None
        if not isinstance(document, str):
            raise InputError(field, f"{url!r} line {number} is no JSON object with a text {text_field!r}")
        documents.append(document)
    return documents


def load_hub(field: str, source: str, hub: HubSplit, columns: Sequence[str]) -> Any:
    """Load the rows of a hub split, a `datasets.Dataset` that has the given columns.

    Raises:
        InputError: it cannot be loaded, or lacks a column.
    """
    from datasets import load_dataset

    files = {hub.split: hub.files} if hub.files else None
    with located(field, repr(source)):
        check_data_files(hub.name, hub.config, hub.files)
    try:
        rows = load_dataset(hub.name, hub.config, split=hub.split, data_files=files, revision=hub.revision)
    except Exception as error:  # `datasets` raises its own, the hub's, and the network's errors
        raise InputError(field, f"{source!r} cannot be loaded as a data set: {first_line(error)}") from error
    for column in columns:
        if column not in rows.column_names:
            raise InputError(field, f"{source!r} has no field {column!r}; use one of {', '.join(rows.column_names)}")
    return rows.select(range(min(hub.rows or len(rows), len(rows))))


def _hub(field: str, source: str, hub: HubSplit) -> Corpus:
    documents = list(load_hub(field, source, hub, [hub.field])[hub.field])
    for number, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise InputError(field, f"{source!r} row {number} is no text")
    return Corpus(documents, hub.separator, hub.by_document, hub.windows)


DATA_FORMS = (
    "alpaca, FILE.json, FILE.jsonl[:FIELD], FILE.txt, FILE.npy, stdlib, wikitext2, ptb, c4 "
    "or hf:NAME[:CONFIG]:SPLIT:FIELD"
)


def is_data(source: str) -> bool:
    """Return whether a source of training data has one of the known forms."""
    return source == "alpaca" or source.endswith(".json") or is_source(source)


def check_data(source: str) -> None:
    """Check the form of a source of training data without reading it.

    Raises:
        InputError: it is none of the known forms.
    """
    if not is_data(source):
        raise InputError("data", f"{source!r} is no known source; use {DATA_FORMS}")
