"""The tokenizer of a checkpoint, which is data of others: it is tried before a run relies on it."""

import math

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shardprune.errors import InputError
from shardprune.model.companions import companions
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.storage.folder import Folder
from shardprune.storage.local_copies import local_copies
from shardprune.storage.tokenising import tokenise

# Runs and mixtures of letters, digits, spaces and marks: a pattern that backtracks does so on one of them.
TRIAL = "\n".join(
    (
        "The quick brown fox jumps over 13 lazy dogs; it isn't the first time, is it?",
        *(character * 2000 for character in "aA0 ._-\t"),
        "word " * 400,
        "x=1, " * 400,
    )
)


def load_tokenizer(folder: Folder) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint and try it.

    Raises:
        InputError: there is none, or it does not work; names the folder's field.
    """
    with local_copies({name: folder.read_bytes(name) for name in companions(folder)}) as local:
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
    tokenise(lambda: tokenizer(TRIAL, verbose=False), len(TRIAL), folder.field, f"a trial text ({folder.url})")
    return tokenizer


def check_ends(tokenizer: PreTrainedTokenizerBase, field: str, *, writes: bool = False) -> None:
    """Check that a tokenizer has the special tokens that lm-eval needs.

    Args:
        writes: texts are to be generated, whose end has a token of its own.

    Raises:
        InputError: it has not; names `field`.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(field, "its tokenizer has no token that begins or ends a text, which lm-eval needs")
    if writes and tokenizer.eos_token_id is None:
        raise InputError(field, "its tokenizer has no token that ends a text, which lm-eval needs to let it write")
