"""The processor of a multimodal checkpoint: its tokenizer, its chat template, and what becomes of images."""

from functools import cache
from typing import Any

from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase

from shardprune.errors import InputError
from shardprune.model.companions import companions
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.storage.folder import Folder
from shardprune.storage.images import blank_image
from shardprune.storage.local_copies import local_copies


class Processor:
    """The processor of a checkpoint.

    Attributes:
        image_token: the text that stands for an image.
        image_id: the token that stands for a feature of an image.

    Raises:
        InputError: there is none, it has no chat template, or it reads no images; names the folder's field.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        with local_copies({name: folder.read_bytes(name) for name in companions(folder)}) as local:
            try:
                with deferred_warnings():
                    self._processor: Any = AutoProcessor.from_pretrained(local, trust_remote_code=False)
            except Exception as error:  # each class raises errors of its own
                reason = in_one_line(error).replace(local, folder.url)
                raise self._error(f"holds no processor that loads: {reason}") from error
        for attribute, what in (
            ("image_processor", "reads no images"),
            ("image_token", "has no token that stands for an image"),
            ("chat_template", "has no chat template"),
        ):
            if getattr(self._processor, attribute, None) is None:
                raise self._error(f"holds a processor that {what}")
        self.image_token: str = self._processor.image_token
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.block = cache(self._block)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._processor.tokenizer

    def shown(self, messages: list[dict[str, Any]], opened: bool) -> str:
        """Return messages as the chat template shows them.

        Args:
            messages: each with its `role` and `content`, a list of texts and images.
            opened: end with what begins the assistant's answer.

        Raises:
            InputError: the template fails.
        """
        try:
            return self._processor.apply_chat_template(messages, add_generation_prompt=opened, tokenize=False)
        except Exception as error:  # templates are programs of others
            raise self._error(f"holds a chat template that fails: {in_one_line(error)}") from error

    def pixels(self, images: list[Any]) -> dict[str, Tensor]:
        """Return what a model is given of images, beside their tokens."""
        return dict(self._processor.image_processor(images=images, return_tensors="pt"))

    def _block(self, width: int, height: int) -> tuple[int, ...]:
        """Return the tokens that stand for an image of a size.

        Raises:
            InputError: the processor fails.
        """
        try:
            made = self._processor(text=[self.image_token], images=[blank_image(width, height)])
        except Exception as error:  # of settings that are not those of the model, in any class
            size = f"{width} x {height}"
            raise self._error(f"holds a processor that fails at an image of {size}: {in_one_line(error)}") from error
        whole, alone = made["input_ids"][0], self.tokenizer(self.image_token)["input_ids"]
        place = alone.index(self.image_id)
        return tuple(whole[place : len(whole) - (len(alone) - place - 1)])

    def _error(self, reason: str) -> InputError:
        return InputError(self._folder.field, f"{self._folder.url} {reason}")
