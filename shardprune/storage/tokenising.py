"""Calls of a tokenizer, which is data of others: its patterns can backtrack for ever, its library can panic."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from shardprune.errors import InputError

T = TypeVar("T")

# Allowed seconds of a call. Slow tokenizers, in Python, process some ten thousand characters a second.
LEAST = 60.0
CHARACTERS_PER_SECOND = 5000


def tokenise(call: Callable[[], T], characters: int, field: str, text: str) -> T:
    """Return the result of a tokenizer's call on so many characters.

    It runs in a thread that is left behind if it does not end; the process can end all the same.

    Args:
        field, text: of the recipe, and a name for the text, for the error.

    Raises:
        InputError: the tokenizer fails, or does not end.
    """
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["result"] = call()
        except BaseException as error:  # a panic in the tokenizers library is no Exception
            found["error"] = error

    thread = threading.Thread(target=run, name="tokenizer", daemon=True)
    seconds = LEAST + characters / CHARACTERS_PER_SECOND
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise InputError(field, f"the tokenizer does not end with {text}: {characters} characters in {seconds:.0f} s")
    if error := found.get("error"):
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(field, f"the tokenizer fails with {text}: {reason[:300]}") from error
    return found["result"]


def check_vocabulary(highest: int, vocabulary: int, field: str, text: str) -> None:
    """Check that a model has an embedding for every token of a text.

    Args:
        highest: token of the text.

    Raises:
        InputError: it has not; the tokenizer is another model's.
    """
    if highest >= vocabulary:
        raise InputError(field, f"the tokenizer makes token {highest} of {text}; the model has {vocabulary}")
