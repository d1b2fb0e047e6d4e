"""Opening what a recipe names: a checkpoint with its skeleton, and the texts that it is measured on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shardprune.errors import without_credentials
from shardprune.model.checkpoint import Checkpoint, place_of
from shardprune.model.checks import check_tensors
from shardprune.model.companions import check_configs
from shardprune.model.skeleton import Skeleton
from shardprune.model.verification import check_class
from shardprune.storage.windows import perplexity_windows

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has every tensor that its config implies, and its skeleton on the CPU."""

    checkpoint: Checkpoint
    skeleton: Skeleton

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, read when it is first needed.

        Raises:
            InputError: there is none.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self.checkpoint.tokenizer()


def open_model(
    model: str,
    field: str = "model",
    *,
    float32: bool = True,
    whole: bool = False,
    ignore: Sequence[str] = (),
    fp8_as: torch.dtype | None = None,
) -> OpenedModel:
    """Open and check a model; its weights stay where they are.

    Args:
        model: a directory, URL or hub name, which `field` of a recipe gives.
        float32: compute in float32, else in the dtype of the stored weights.
        whole: of what is stored, look at biases and norms, too.
        ignore: globs over the names of projections that are left alone.
        fp8_as: dtype in which FP8 weights are read; None: the config's.

    Raises:
        InputError: there is no such checkpoint, it is not whole, or its class of models cannot be pruned.
    """
    checkpoint = open_checkpoint(place_of(model), field, fp8_as)
    dtype = torch.float32 if float32 else stored_dtype(checkpoint, whole)
    skeleton = Skeleton(checkpoint.config, "cpu", dtype, ignore)
    check_class(checkpoint.config)
    check_tensors(skeleton, checkpoint)
    check_configs(checkpoint.folder, checkpoint.companions())
    return OpenedModel(checkpoint, skeleton)


def open_checkpoint(place: str, field: str, fp8_as: torch.dtype | None = None) -> Checkpoint:
    """Open a checkpoint, and log what was decided about its files.

    Args:
        fp8_as: dtype in which FP8 weights are read; None: the config's.

    Raises:
        InputError: there is no such checkpoint.
    """
    checkpoint = Checkpoint(place, field, fp8_as)
    for note in checkpoint.notes():
        _say_once(note)
    return checkpoint


@cache
def _say_once(note: str) -> None:
    """Log a note about a model, once in a process: a pipeline opens the same model for each of its steps."""
    _logger.warning("%s", note)


def stored_dtype(checkpoint: Checkpoint, whole: bool = False) -> torch.dtype:
    """Return the dtype in which a checkpoint has its weights; float32 where they differ.

    Args:
        whole: look at biases and norms, too.
    """
    stored = {
        entry.dtype
        for name, entry in checkpoint.entries.items()
        if len(entry.shape) == 2 or (whole and entry.dtype.is_floating_point and not name.endswith("inv_freq"))
    }
    return stored.pop() if len(stored) == 1 else torch.float32


def open_texts(
    sources: Sequence[str], model: OpenedModel, seqlen: int, limit: int | None, field: str = "eval"
) -> dict[str, Tensor]:
    """Return the windows [windows, seqlen] of every source that perplexity is measured on, by its name without
    credentials.

    Args:
        limit: of the windows of a source, use the first so many only.

    Raises:
        InputError: a source, which `field` of a recipe gives, is shorter than one window, or cannot be read.
    """
    vocabulary = model.skeleton.config.vocab_size
    return {
        without_credentials(source): perplexity_windows(source, model.tokenizer, seqlen, vocabulary, limit, field)
        for source in sources
    }
