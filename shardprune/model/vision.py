"""What a multimodal model puts before its language model: the vision tower, and the projector behind it.

transformers' own class of the whole model runs both, and its language model is the one that it is given: the images'
features take the places of their tokens, as that class has it. The tower's weights are read and never written.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.empty_model import empty_multimodal_model, persistent_buffers

# Models whose class needs nothing but the tokens and the pixels: others are told of positions in three dimensions, of
# tokens that see those behind them, or hand features on between layers.
SEEING = ("llava",)
META = torch.device("meta")


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


class Vision:
    """The vision tower and the projector of a checkpoint, without values until they are loaded.

    Attributes:
        tensors: names in the checkpoint of its parameters and persistent buffers, by their names in the whole model.

    Raises:
        InputError: the checkpoint lacks one of its tensors.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        config = checkpoint.whole_config
        self._model = empty_multimodal_model(config, checkpoint.config, dtype, device).eval().requires_grad_(False)
        self._place = _language_model(self._model)
        self.tensors = self._stored_names()

    @cached_property
    def parameters(self) -> int:
        """The number of parameters."""
        values = dict(self._model.named_parameters())
        return sum(values[name].numel() for name in self.tensors if name in values)

    def features_on_meta(self, inputs: dict[str, Tensor]) -> int:
        """Return the number of features that images have, of a model whose device is the meta device.

        Args:
            inputs: what the processor makes of the images.
        """
        given = {name: tensor.to(META) for name, tensor in inputs.items()}
        output = self._model.base_model.get_image_features(**given, return_dict=True)
        return sum(len(features) for features in output.pooler_output)

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
        parent, _, name = self._place.rpartition(".")
        setattr(self._model.get_submodule(parent), name, language)
        return self._model.base_model

    def _stored_names(self) -> dict[str, str]:
        transforms = get_model_conversion_mapping(self._model)
        renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        inside: dict[str, Any] = self._model.state_dict()
        found = {
            rename_source_key(name, renamings, converters, self._model.base_model_prefix, inside)[0]: name
            for name in self._checkpoint.entries
        }
        wanted = [name for name in inside if not name.startswith((f"{self._place}.", "lm_head."))]
        if missing := [name for name in wanted if name not in found]:
            checkpoint = self._checkpoint.folder
            raise InputError(checkpoint.field, f"{checkpoint.url} holds no tensor {missing[0]}")
        return {name: found[name] for name in wanted}


def _language_model(model: PreTrainedModel) -> str:
    """Return the path of the language model in a multimodal one."""
    language = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model.language_model
    return next(path for path, module in model.named_modules() if module is language)
