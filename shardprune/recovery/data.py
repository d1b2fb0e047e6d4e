"""The forms that a source of training data may have; `examples` says what each is."""

from shardprune.errors import InputError
from shardprune.sources import is_source

DATA_FORMS = (
    "alpaca, FILE.json, FILE.jsonl[:FIELD], FILE.txt, FILE.npy, stdlib, wikitext2, ptb, c4 "
    "or hf:NAME[:CONFIG]:SPLIT:FIELD"
)


def check_data(source: str) -> None:
    """Check the form of a source of training data without reading it.

    Raises:
        InputError: it has none of the known forms.
    """
    if source != "alpaca" and not source.endswith(".json") and not is_source(source):
        raise InputError("data", f"{source!r} is no known source; use {DATA_FORMS}")
