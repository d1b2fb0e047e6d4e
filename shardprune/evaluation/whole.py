"""lm-eval's own Hugging Face model, whole in this process, which can also generate text."""

import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

from shardprune.errors import InputError, first_line
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.skeleton import attention_of


def whole_model(model: ShardedModel) -> LM:
    """Load lm-eval's Hugging Face model of a checkpoint, with the device, dtype and attention that shards would use.

    Raises:
        InputError: transformers cannot load it from its location.
    """
    settings = model.settings
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        return HFLM(
            pretrained=model.checkpoint.folder.url.removeprefix("hf://"),
            dtype=str(model.skeleton.dtype).removeprefix("torch."),
            device=settings.device,
            batch_size=settings.wave or 1,
            trust_remote_code=False,
            attn_implementation=attention_of(model.skeleton.config),
        )
    except (OSError, ValueError) as error:
        where = model.checkpoint.folder.url
        raise InputError("engine", f"'hf' cannot load {where!r}; use shards: {first_line(error)}") from error
