"""lm-eval's own Hugging Face model, whole in this process, which can also generate text."""

from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from shardprune.errors import InputError, first_line
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.skeleton import attention_of
from shardprune.storage.tokenising import check_vocabulary


class _CheckedLM(HFLM):
    """lm-eval's model, with an error of one line for a token that the model does not know."""

    def tok_encode(self, *args: Any, **kwargs: Any) -> list[int]:
        tokens = super().tok_encode(*args, **kwargs)
        self._check(max(tokens, default=0))
        return tokens

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        tokens, mask = super().tok_batch_encode(*args, **kwargs)
        self._check(int(tokens.max()) if tokens.numel() else 0)
        return tokens, mask

    def _check(self, highest: int) -> None:
        known = self.model.get_input_embeddings().num_embeddings
        check_vocabulary(highest, known, "model", "a task's text")


def whole_model(model: ShardedModel) -> LM:
    """Load lm-eval's Hugging Face model of a checkpoint, with the device, dtype and attention that shards would use.

    Raises:
        InputError: transformers cannot load it from its location.
    """
    settings = model.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        return _CheckedLM(
            pretrained=model.checkpoint.folder.url.removeprefix("hf://"),
            dtype=str(model.skeleton.dtype).removeprefix("torch."),
            device=settings.device,
            batch_size=settings.wave or 1,
            trust_remote_code=False,
            attn_implementation=attention_of(model.skeleton.config),
        )
    except InputError:
        raise
    except (OSError, ValueError) as error:
        where = model.checkpoint.folder.url
        raise InputError("engine", f"'hf' cannot load {where!r}; use shards: {first_line(error)}") from error
