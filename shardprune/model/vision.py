"""What a multimodal model puts before its language model: the vision tower, and the projector behind it.

transformers' own class of the whole model runs both, and its language model is the one that it is given: the images'
features take the places of their tokens, as that class has it. The tower's weights are read and never written.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import empty_multimodal_model, persistent_buffers
from shardprune.model.meta_device import OnMeta, without_values

# Models that learn from images. Whatever else a class is given because of them is in the signature of its forward pass.
# Of others, images are not all that the class puts before its language model, or that model runs otherwise here.
SEEING = (
    "gemma3",
    "internvl",
    "llava",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
)
# The arguments by which a class learns which tokens stand for images.
TYPES = ("mm_token_type_ids", "token_type_ids")


def check_seeing(config: PretrainedConfig, field: str) -> None:
    """Check that a model learns from images.

    Raises:
        InputError: it does not; names `field`, whose source shows images.
    """
    if config.model_type not in SEEING:
        known = ", ".join(SEEING)
        raise InputError(
            field, f"shows images, from which model_type {config.model_type!r} is not trained, only {known}"
        )


def check_same_sight(teacher: PretrainedConfig, config: PretrainedConfig, name: str) -> None:
    """Check that a teacher is given images as the model is whose rows it sees, too.

    Args:
        name: of the teacher, for the error.

    Raises:
        InputError: it sees none, or is another model.
    """
    if teacher.model_type not in SEEING:
        raise InputError("teacher", f"{name} sees no images, which the rows show")
    if teacher.model_type != config.model_type:
        kinds = f"model_type {teacher.model_type!r}, the model of {config.model_type!r}"
        raise InputError("teacher", f"{name} is of {kinds}: they are given images in different ways")


@dataclass(frozen=True)
class Arguments:
    """What the class of a model that sees images is given because of them.

    Attributes:
        of_images: names of its arguments; those of them that the processor makes of images are given.
        types: the one that says which tokens stand for images; None where it has none.
        positions: it is given positions. Classes with positions in three dimensions make their own of the images.
    """

    of_images: frozenset[str]
    types: str | None
    positions: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Arguments":
        """Return those of the class of a config, by its forward pass."""
        model_class = MODEL_MAPPING[type(config)]
        names = frozenset(inspect.signature(model_class.forward).parameters)
        types = next((name for name in TYPES if name in names), None)
        of_images = names - {"self", "input_ids", "attention_mask", "position_ids", "labels", *TYPES}
        return cls(of_images, types, not hasattr(model_class, "get_rope_index"))


def image_shape(config: PretrainedConfig) -> tuple[int, int, int] | None:
    """Return the channels, height and width of an image as a model's vision tower takes it; None if of any size."""
    vision = config.vision_config
    size = getattr(vision, "image_size", None)
    if size is None:
        return None
    height, width = (size,) * 2 if isinstance(size, int) else size
    return vision.num_channels, height, width


class Vision:
    """The vision tower and the projector of a config, without values.

    Args:
        config: of the whole model.
        language: of its language model.
    """

    def __init__(
        self, config: PretrainedConfig, language: PretrainedConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._model = empty_multimodal_model(config, language, dtype, device).eval().requires_grad_(False)
        self._place = _language_model(self._model)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(value.numel() for name, value in self._model.named_parameters() if self._sees(name))

    def features_on_meta(self, inputs: dict[str, Tensor]) -> list[int]:
        """Return the number of features of each image, or of each part of one that the tower sees alone, of a model
        whose device is the meta device.

        Args:
            inputs: what the processor makes of the images.
        """
        with OnMeta():
            output = self._model.base_model.get_image_features(**without_values(inputs), return_dict=True)
        return [len(features) for features in output.pooler_output]

    def around(self, language: nn.Module) -> PreTrainedModel:
        """Return the model without its head, whose language model is the one given."""
        parent, _, name = self._place.rpartition(".")
        setattr(self._model.get_submodule(parent), name, language)
        return self._model.base_model

    def _sees(self, name: str) -> bool:
        """Return whether a tensor of the whole model, by its name there, is one of the tower or the projector."""
        return not name.startswith((f"{self._place}.", "lm_head."))


class StoredVision(Vision):
    """The vision tower and the projector of a checkpoint, without values until they are loaded.

    Attributes:
        tensors: names in the checkpoint of its parameters and persistent buffers, by their names in the whole model.

    Raises:
        InputError: the checkpoint lacks one of its tensors.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(checkpoint.whole_config, checkpoint.config, dtype, device)
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self.tensors = self._stored_names()

    def load(self, language: nn.Module) -> PreTrainedModel:
        """Read the weights; return the model without its head, whose language model is the one given."""
        buffers = persistent_buffers(self._model)
        for name, stored in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            module, value = self._model.get_submodule(path), self._checkpoint.read(stored)
            if name in buffers:
                module._buffers[leaf] = value.to(self._device, buffers[name].dtype)
            else:
                module._parameters[leaf] = nn.Parameter(value.to(self._device, self._dtype), requires_grad=False)
        self._checkpoint.check_unchanged(self.tensors.values())
        return self.around(language)

    def _stored_names(self) -> dict[str, str]:
        transforms = get_model_conversion_mapping(self._model)
        renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        inside: dict[str, Any] = self._model.state_dict()
        found = {
            rename_source_key(name, renamings, converters, self._model.base_model_prefix, inside)[0]: name
            for name in self._checkpoint.entries
        }
        wanted = [name for name in inside if self._sees(name)]
        if missing := [name for name in wanted if name not in found]:
            checkpoint = self._checkpoint.folder
            raise InputError(checkpoint.field, f"{checkpoint.url} holds no tensor {missing[0]}")
        return {name: found[name] for name in wanted}


def _language_model(model: PreTrainedModel) -> str:
    """Return the path of the language model in a multimodal one."""
    language = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model.language_model
    return next(path for path, module in model.named_modules() if module is language)
