"""The processor of a multimodal checkpoint: its tokenizer, its chat template, and what becomes of images."""

import re
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoProcessor, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from shardprune.errors import InputError
from shardprune.model.companions import companions
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.model.vision import Arguments
from shardprune.storage.folder import Folder
from shardprune.storage.images import blank_image
from shardprune.storage.local_copies import local_copies

QUIETLY = {"verbose": False}  # the tokenizer would say that this text is longer than the model's rows


class ImageText(NamedTuple):
    """What stands for an image in a text that is tokenised.

    Attributes:
        text: with one token of features for each run of them, so that it is short.
        runs: the length of each run.
    """

    text: str
    runs: tuple[int, ...]


class Processor:
    """The processor of a checkpoint.

    Args:
        config: of the whole model.

    Attributes:
        image_token: the text that stands for an image before the processor has seen it.
        image_id: the token whose place a feature of an image takes.

    Raises:
        InputError: there is none, it has no chat template, or it reads no images; names the folder's field.
    """

    def __init__(self, folder: Folder, config: PretrainedConfig) -> None:
        self._folder = folder
        self._arguments = Arguments.of(config)
        with local_copies({name: folder.read_bytes(name) for name in companions(folder)}) as local:
            try:
                with deferred_warnings():
                    self._processor = _load(local, config)
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
        self.image_id: int = config.image_token_id
        self.image_text = cache(self._image_text)

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
        text = [self.image_token * len(images)]
        made = self._processor(text=text, images=images, return_tensors="pt", text_kwargs=QUIETLY)
        return {name: tensor for name, tensor in made.items() if name in self._arguments.of_images}

    def completed(self, inputs: dict[str, Tensor], images: list[Any]) -> dict[str, Tensor]:
        """Return the arguments of a model's forward pass on rows, with all that it is given because of images.

        Args:
            inputs: of rows, see `Rows.collate`.
            images: that the rows show, in their order.
        """
        given = dict(inputs)
        if not self._arguments.positions:
            del given["position_ids"]
        if name := self._arguments.types:
            types = self._processor.create_mm_token_type_ids(inputs["input_ids"].tolist())
            given[name] = torch.tensor(types, dtype=torch.int64)
        return given | (self.pixels(images) if images else {})

    def _image_text(self, width: int, height: int) -> ImageText:
        """Return what stands for an image of a size.

        Raises:
            InputError: the processor fails.
        """
        try:
            made = self._processor(
                text=[self.image_token],
                images=[blank_image(width, height)],
                return_text_replacement_offsets=True,
                text_kwargs=QUIETLY,
            )
            ((replaced,),) = made["text_replacement_offsets"]
        except Exception as error:  # of settings that are not those of the model, in any class
            size = f"{width} x {height}"
            raise self._error(f"holds a processor that fails at an image of {size}: {in_one_line(error)}") from error
        token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        runs: list[int] = []

        def one_of(run: re.Match[str]) -> str:
            runs.append(len(run[0]) // len(token))
            return token

        text = re.sub(f"(?:{re.escape(token)})+", one_of, replaced["replacement"])
        if not runs:
            raise self._error(f"holds a processor that makes no {token} of an image of {width} x {height}")
        return ImageText(text, tuple(runs))

    def _error(self, reason: str) -> InputError:
        return InputError(self._folder.field, f"{self._folder.url} {reason}")


VIDEOS = "video_processor"


def _load(local: str, config: PretrainedConfig) -> Any:
    """Load the processor of a directory, without the part that reads videos: it needs torchvision, and no video is
    read."""
    family = PROCESSOR_MAPPING.get(type(config), None)
    if family is None or VIDEOS not in family.get_attributes():
        return AutoProcessor.from_pretrained(local, trust_remote_code=False)

    class OfImages(family):  # type: ignore[misc,valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != VIDEOS]

    return OfImages.from_pretrained(local)
