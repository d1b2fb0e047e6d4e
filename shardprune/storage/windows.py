"""Token windows [samples, seqlen] for calibration and for perplexity."""

import hashlib
import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shardprune.errors import InputError
from shardprune.storage.host_memory import host_memory
from shardprune.storage.quantities import gigabytes
from shardprune.storage.sources import Corpus, is_tokens, load_corpus, load_tokens
from shardprune.storage.tokenising import check_vocabulary, tokenise

Tokenizer = Callable[[], PreTrainedTokenizerBase]  # loads the tokenizer, only if text has to be tokenised


def calibration_windows(
    source: str, tokenizer: Tokenizer, samples: int, seqlen: int, seed: int, vocabulary: int
) -> Tensor:
    """Draw windows from a source's token stream with a seed; return int64 [samples, seqlen].

    Raises:
        InputError: the source is shorter than one window, or holds too few samples; memory does not hold so many; or
            the tokenizer fails, or is another model's.
    """
    if is_tokens(source):
        tokens = _stored_windows("calibration", source, seqlen, vocabulary)
        if len(tokens) < samples:
            raise InputError("samples", f"{samples} is more than the {len(tokens)} rows of {source!r}")
        return tokens[:samples]
    _check_room(samples, seqlen)
    corpus = load_corpus("calibration", source, "calibration")
    if corpus.by_document:
        return _draw_from_documents(corpus, tokenizer(), samples, seqlen, seed, source, vocabulary)
    stream = _tokenise(tokenizer(), corpus.text, "calibration", source, vocabulary)
    _check_length("calibration", source, stream, seqlen)
    draw = random.Random(seed)
    starts = [draw.randint(0, len(stream) - seqlen) for _ in range(samples)]
    return torch.stack([stream[start : start + seqlen] for start in starts])


def perplexity_windows(
    source: str, tokenizer: Tokenizer, seqlen: int, vocabulary: int, limit: int | None, field: str = "eval"
) -> Tensor:
    """Cut a source's token stream into non-overlapping windows, int64 [windows, seqlen]; the remainder is dropped.

    The text is tokenised as one stream, as SparseGPT and Wanda do.

    Args:
        limit: keep the first windows only; None: all.
        field: the recipe's field that names the source, for errors.

    Raises:
        InputError: the source is shorter than one window; or the tokenizer fails, or is another model's.
    """
    if is_tokens(source):
        return _stored_windows(field, source, seqlen, vocabulary)[:limit]
    corpus = load_corpus(field, source, "perplexity")
    stream = _tokenise(tokenizer(), corpus.text, field, source, vocabulary)
    _check_length(field, source, stream, seqlen)
    return stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)[: corpus.windows][:limit].clone()


def tokens_hash(tokens: Tensor) -> str:
    """Return the SHA-256 of int64 token ids in C order."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str, field: str, source: str, vocabulary: int) -> Tensor:
    """Return the tokens of a text, int64 [tokens], all of which the model knows."""
    name = repr(source)
    ids = tokenise(lambda: tokenizer(text, verbose=False).input_ids, len(text), field, name)
    tokens = torch.tensor(ids, dtype=torch.int64)
    check_vocabulary(int(tokens.max()) if len(tokens) else 0, vocabulary, field, name)
    return tokens


def _check_length(field: str, source: str, stream: Tensor, seqlen: int) -> None:
    if len(stream) < seqlen:
        raise InputError(field, f"{source!r} has {len(stream)} tokens, too short for one window of seqlen {seqlen}")


def _stored_windows(field: str, source: str, seqlen: int, vocabulary: int) -> Tensor:
    tokens = torch.from_numpy(load_tokens(field, source, vocabulary))
    if tokens.shape[1] != seqlen:
        raise InputError("seqlen", f"{seqlen} is not the row length {tokens.shape[1]} of {source!r}")
    return tokens


def _check_room(samples: int, seqlen: int) -> None:
    """Check that the ids of all windows, and what they are put together from, fit into half of this machine's memory.

    Raises:
        InputError: they do not; names the number that does.
    """
    needed, room = 2 * samples * seqlen * torch.int64.itemsize, host_memory() // 2
    if needed > room:
        fit = samples * room // needed
        use = f"use at most {fit:,}" if fit else "use a smaller seqlen"
        raise InputError(
            "samples",
            f"{samples} windows of {seqlen} tokens take {gigabytes(needed)} while they are drawn, and this machine's "
            f"memory has room for {gigabytes(room)} of them; {use}",
        )


def _draw_from_documents(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    seed: int,
    source: str,
    vocabulary: int,
) -> Tensor:
    """Draw one window from each document that is long enough, in an order drawn with the seed, again from the first if
    they run out.
    """
    draw = random.Random(seed)
    order = draw.sample(corpus.documents, len(corpus.documents))
    windows: list[Tensor] = []
    while True:
        before = len(windows)
        for document in order:
            tokens = _tokenise(tokenizer, document, "calibration", source, vocabulary)
            if len(tokens) >= seqlen:
                start = draw.randint(0, len(tokens) - seqlen)
                windows.append(tokens[start : start + seqlen])
            if len(windows) == samples:
                return torch.stack(windows)
        if len(windows) == before:
            raise InputError("calibration", f"{source!r} has no document of {seqlen} tokens, one window of seqlen")
