"""The tokenizer of a checkpoint, which is data of others: it is tried before a run relies on it."""

import math
import tempfile
import threading
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shardprune.errors import InputError
from shardprune.model.companions import companions
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.storage.folder import Folder

# Runs and mixtures of letters, digits, spaces and marks: a pattern that backtracks does so on one of them.
TRIAL = "\n".join(
    (
        "The quick brown fox jumps over 13 lazy dogs; it isn't the first time, is it?",
        *(character * 2000 for character in "aA0 ._-\t"),
        "word " * 400,
        "x=1, " * 400,
    )
)
SECONDS = 60.0  # for the trial, which takes a usual tokenizer some milliseconds


def load_tokenizer(folder: Folder) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint and try it.

    Raises:
        InputError: there is none, or it does not work; names the folder's field.
    """
    with tempfile.TemporaryDirectory() as local:  # transformers reads these files from a local path only
        for name in companions(folder):
            Path(local, name).write_bytes(folder.read_bytes(name))
        try:
            with deferred_warnings():
                tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
        except Exception as error:  # each tokenizer class raises errors of its own
            reason = in_one_line(error).replace(local, folder.url)
            raise InputError(folder.field, f"{folder.url} holds no tokenizer that loads: {reason}") from error
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or math.isnan(limit) or limit < 1:
        raise InputError(
            folder.field, f"{folder.url}/tokenizer_config.json: model_max_length is {limit!r}; use a positive number"
        )
    _try(tokenizer, folder)
    return tokenizer


def _try(tokenizer: PreTrainedTokenizerBase, folder: Folder) -> None:
    """Tokenise the trial text, in a thread that can be left behind.

    Raises:
        InputError: the tokenizer fails, or does not end.
    """
    found: dict[str, Any] = {}

    def tokenise() -> None:
        try:
            found["tokens"] = tokenizer(TRIAL, verbose=False).input_ids
        except BaseException as error:  # a panic in the tokenizers library is no Exception
            found["error"] = error

    thread = threading.Thread(target=tokenise, name="trial of a tokenizer", daemon=True)
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        reason = f"does not end with {len(TRIAL)} characters in {SECONDS:g} s"
        raise InputError(folder.field, f"the tokenizer of {folder.url} {reason}")
    if error := found.get("error"):
        raise InputError(folder.field, f"the tokenizer of {folder.url} fails: {in_one_line(error)}") from error
