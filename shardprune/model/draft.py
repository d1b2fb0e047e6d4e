"""Drafts: what a text that a model writes is decided by, beside the model."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shardprune.errors import InputError
from shardprune.model.derivation import run_layer_on_meta, small_parts_blank
from shardprune.model.kept_keys import KeptKeys
from shardprune.model.skeleton import Skeleton
from shardprune.solvers.sampling import draws

DROPPED = 8  # tokens at the start of a sequence that do not count: they follow from the random one


@dataclass(frozen=True)
class Draft:
    """Sequences of tokens to be written, [sequences, seqlen] in the end.

    A sequence begins with the token `bos`, where there is one, and a random token of those below `vocabulary` that are
    not `special`; each further token is sampled at `temperature`. The first `dropped` tokens do not count.

    Sequences are computed in batches of `batch`, always the same ones: the results of products depend on how many rows
    are multiplied together, so that another size would be another text.
    """

    sequences: int
    seqlen: int
    seed: int
    temperature: float
    batch: int
    dropped: int
    bos: int | None
    vocabulary: int
    special: tuple[int, ...]

    @property
    def length(self) -> int:
        """The tokens of a sequence, those that do not count included."""
        return self.dropped + self.seqlen

    @property
    def batches(self) -> list[range]:
        """The sequences of each batch."""
        return [range(start, min(start + self.batch, self.sequences)) for start in range(0, self.sequences, self.batch)]

    def draws(self, sequences: range) -> Tensor:
        """Return the uniform numbers for every token of some sequences, float64 [sequences, length]."""
        return draws(self.seed, sequences, self.length)

    def openings(self, sequences: range) -> Tensor:
        """Return the tokens that some sequences begin with, int64 [sequences, 1 or 2]."""
        ordinary = torch.ones(self.vocabulary, dtype=torch.bool)
        ordinary[list(self.special)] = False
        choices = ordinary.nonzero().squeeze(1)
        bos = [] if self.bos is None else [torch.full((len(sequences),), self.bos)]
        uniform = draws(self.seed, sequences, len(bos) + 1)[:, -1]
        return torch.stack([*bos, choices[(uniform * len(choices)).long()]], 1)

    def record(self) -> dict[str, Any]:
        """Return everything that decides the text as plain values; how many sequences there are does not, but which of
        them are batches of their own."""
        digest = hashlib.sha256(repr(sorted(self.special)).encode()).hexdigest()
        return {**vars(self), "special": digest}


def draft_of(
    skeleton: Skeleton,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    sequences: int,
    seqlen: int,
    seed: int,
    temperature: float,
    batch: int,
    beginning: bool,
) -> Draft:
    """Return the draft of a model.

    Its tokenizer says which tokens are none of a text; without one the config names them. Of a sequence that has no
    room for dropped tokens, because the model takes no more positions than `seqlen`, as many are dropped as there is
    room for.

    Args:
        tokenizer: the model's; None where it has none.
        batch: sequences that are computed together.
        beginning: sequences begin with the token that the tokenizer puts before a text.

    Raises:
        InputError: it puts none.
    """
    config = skeleton.config
    bos = _beginning(tokenizer) if tokenizer and beginning else None
    if beginning and bos is None:
        raise InputError("self_bos", "the model's tokenizer puts no token before a text; leave it out")
    room = (getattr(config, "max_position_embeddings", None) or 2**31) - seqlen
    dropped = max(0, min(DROPPED + (bos is not None), room))
    vocabulary, special = _ordinary(tokenizer, config)
    return Draft(sequences, seqlen, seed, temperature, batch, dropped, bos, vocabulary, special)


@dataclass(frozen=True)
class Kept:
    """What layers keep of one sequence: `elements` of keys and values of each token, and `states` in bytes (of
    convolutions, linear attention, state spaces), which do not grow."""

    elements: int = 0
    states: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(self.elements + other.elements, self.states + other.states)

    def bytes_of(self, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of a sequence of `length` tokens."""
        return length * self.elements * dtype.itemsize + self.states


def kept_by(skeleton: Skeleton, layers: Iterable[int]) -> list[Kept]:
    """Return what each of some layers keeps, in the skeleton's dtype: found out by a token on the meta device."""
    kept = KeptKeys(skeleton.layers, 1, skeleton.attentions)
    layers_of_model = skeleton.model.get_submodule(skeleton.family.layers)
    assert isinstance(layers_of_model, nn.ModuleList)
    with small_parts_blank(skeleton.model, layers_of_model):  # they may not be loaded yet
        arguments = skeleton.next_arguments(1, kept)
    token = torch.zeros(1, 1, skeleton.family.carried.hidden, dtype=skeleton.dtype)
    found: dict[int, Kept] = {}  # by the layer's kind
    listed = []
    for index in layers:
        kind = id(skeleton.family.kinds[index])
        if kind not in found:
            run_layer_on_meta(skeleton.blank(index), token, arguments[index])
            found[kind] = Kept(kept.elements(index), kept.state_bytes(index))
        listed.append(found[kind])
    return listed


def _beginning(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that a tokenizer puts before every text, where it does."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def _ordinary(tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> tuple[int, tuple[int, ...]]:
    """Return the number below which all tokens are that a text may begin with, and those of them that it may not."""
    if tokenizer is None:
        vocabulary = config.vocab_size
        named = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    else:
        vocabulary = min(len(tokenizer), config.vocab_size)  # a model may have more rows than there are tokens
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = {token for token in special if isinstance(token, int) and 0 <= token < vocabulary}
    if len(known) == vocabulary:
        known = set()
    return vocabulary, tuple(sorted(known))
