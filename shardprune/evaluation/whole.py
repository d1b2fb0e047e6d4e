"""lm-eval's own Hugging Face models, whole in this process, which can also generate text, and see images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models import hf_vlms, huggingface
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from shardprune.errors import InputError, first_line
from shardprune.evaluation.sharded import ShardedModel
from shardprune.model.empty_model import attention_of
from shardprune.report.progress import Reporter
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


class WholeModel(_CheckedLM):
    """lm-eval's Hugging Face model, whose progress is that of the command: a part is a request."""

    def __init__(self, reporter: Reporter, **settings: Any) -> None:
        super().__init__(**settings)
        self._reporter = reporter

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate the texts that requests ask for."""
        with self._told("generation", len(requests)):
            return super().generate_until(requests)

    def _loglikelihood_tokens(self, requests: list[Any], **settings: Any) -> list[tuple[float, bool]]:
        with self._told("log-likelihoods", len(requests)):
            return super()._loglikelihood_tokens(requests, **settings)

    @contextmanager
    def _told(self, label: str, requests: int) -> Iterator[None]:
        """Report as a step what lm-eval would draw as a bar of its own, which has no other way to learn of it."""
        with self._reporter.step(label, requests) as step:

            class Bar(tqdm):
                def __init__(self, *args: Any, **kwargs: Any) -> None:
                    super().__init__(*args, **{**kwargs, "disable": True})

                def update(self, count: float | None = 1) -> None:
                    step.advance(int(count or 0))

            modules = huggingface, hf_vlms
            own = [module.tqdm for module in modules]
            for module in modules:
                module.tqdm = Bar
            try:
                yield
            finally:
                for module, bar in zip(modules, own, strict=True):
                    module.tqdm = bar


class SeeingModel(WholeModel, HFMultimodalLM):
    """lm-eval's model that writes about images; what shows none goes the way of its model of text."""

    def __init__(self, reporter: Reporter, **settings: Any) -> None:
        super().__init__(reporter, **settings)
        # lm-eval takes the token of a feature, for which some processors do not look in a text (Gemma 3).
        if token := getattr(self.processor, "image_token", None):
            self.image_token: str = token

    def tok_batch_multimodal_encode(self, *args: Any, **kwargs: Any) -> Any:
        encoding = super().tok_batch_multimodal_encode(*args, **kwargs)
        self._check(int(encoding["input_ids"].max()))
        return encoding


def whole_model(model: ShardedModel, seeing: bool = False) -> LM:
    """Load lm-eval's Hugging Face model of a checkpoint, with the device, dtype and attention that shards would use.

    Args:
        seeing: the one for tasks that show images.

    Raises:
        InputError: transformers cannot load it from its location, or would not run it as the shards do.
    """
    settings = model.settings
    if model.checkpoint.fp8 and settings.device != "cpu":  # lm-eval cannot be told to
        raise InputError("engine", "'hf' does not multiply FP8 weights with their scales on a GPU; use shards")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        return (SeeingModel if seeing else WholeModel)(
            model.reporter,
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
