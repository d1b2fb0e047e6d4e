"""Text that a model has written for its own calibration, kept in a run's output.

Two files: `self.npy`, token ids int64 [sequences, seqlen], and `self.json`, written after it, which says by what the
text was decided, how many of its sequences are there, and what these hash to. Sequences are added in whole batches.
"""

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import fitting
from shardprune.storage.malformed import Malformed, located
from shardprune.storage.npy_file import npy_bytes, parse_npy
from shardprune.storage.output_names import SELF_RECORD, SELF_TOKENS
from shardprune.storage.windows import tokens_hash


class SelfText(BaseModel):
    """The content of `self.json`. `draft` is what decided the text, `model` the identity of the checkpoint that wrote
    it; `written` sequences are there."""

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)] = 1
    model: str
    dtype: str
    draft: dict[str, Any]
    written: Annotated[int, Field(ge=1)]
    tokens_sha256: str


def save(folder: Folder, text: dict[str, Any], tokens: Tensor) -> None:
    """Write the sequences [sequences, seqlen] that are there so far.

    Args:
        text: the fields `model`, `dtype` and `draft` of `SelfText`.
    """
    record = SelfText(**text, written=len(tokens), tokens_sha256=tokens_hash(tokens))
    folder.write_bytes(SELF_TOKENS, npy_bytes(tokens.numpy()))
    folder.write_json(SELF_RECORD, record.model_dump(mode="json"))


def found(folder: Folder, text: dict[str, Any]) -> Tensor | None:
    """Return the sequences [written, seqlen] that a run has kept of a text; None where there are none, they are of
    another text, or damaged: the model writes them again.

    Args:
        text: as for `save`.
    """
    if not folder.is_file(SELF_RECORD) or not folder.is_file(SELF_TOKENS):
        return None
    try:
        record = fitting(folder.read_json(SELF_RECORD), SelfText)
        tokens = _tokens(folder, record)
    except Malformed:
        return None
    return tokens if {name: getattr(record, name) for name in text} == text else None


def load(url: str, samples: int, seqlen: int, vocabulary: int) -> Tensor:
    """Return the first `samples` sequences [samples, seqlen] of the text that the model of a finished run has written.

    Args:
        url: the run's output.

    Raises:
        InputError: it holds no such text or too few sequences, or they have another length or another vocabulary.
    """
    folder = Folder(url, "calibration")
    if not folder.is_file(SELF_RECORD):
        problem = f"{url!r} holds no text that a model has written for itself ({SELF_RECORD}); give a run's output"
        raise InputError("calibration", problem)
    with located("calibration", f"{folder.url}/{SELF_RECORD}"):
        record = fitting(folder.read_json(SELF_RECORD), SelfText)
    with located("calibration", f"{folder.url}/{SELF_TOKENS}"):
        tokens = _tokens(folder, record)
    if tokens.shape[1] != seqlen:
        raise InputError("seqlen", f"{seqlen} is not the length {tokens.shape[1]} of the sequences of self:{url}")
    if len(tokens) < samples:
        raise InputError("samples", f"{samples} is more than the {len(tokens)} sequences of self:{url}")
    if int(tokens.max()) >= vocabulary:
        raise InputError("calibration", f"self:{url} holds tokens that the model has not; it has {vocabulary}")
    return tokens[:samples]


def _tokens(folder: Folder, record: SelfText) -> Tensor:
    """Return the sequences that a record speaks of.

    Raises:
        Malformed: they are not there, or not what was written.
    """
    if not folder.is_file(SELF_TOKENS):
        raise Malformed("does not exist")
    tokens = torch.from_numpy(parse_npy(folder.read_bytes(SELF_TOKENS), np.int64))
    if tokens.ndim != 2 or not tokens.numel() or int(tokens.min()) < 0:
        raise Malformed(f"is int64 {[*tokens.shape]}; use token ids [sequences, seqlen]")
    # More may be there than the record says: it is written last.
    if tokens_hash(tokens[: record.written]) != record.tokens_sha256:
        raise Malformed("holds other tokens than were written")
    return tokens[: record.written]
