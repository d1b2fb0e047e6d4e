"""The names of a checkpoint's tensors, in its files and in the model that transformers builds of them."""

from collections.abc import Iterable

import torch
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from shardprune.model.empty_model import empty_model


def names_in_model(config: PretrainedConfig, stored: Iterable[str]) -> dict[str, str]:
    """Return the names of stored tensors in the causal language model by their stored names, as transformers has them.

    A tensor that transformers converts, and does not only rename, has no name in the model, and keeps its own.

    Raises:
        InputError: transformers builds no model from the config.
    """
    classes = [mapping.get(type(config), None) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING)]
    known = [config.model_type, *(one.__name__ for one in classes if one)]
    if not any(get_checkpoint_conversion_mapping(one) for one in known):  # most classes: no model need be built
        return {name: name for name in stored}
    model = empty_model(config, torch.float32, torch.device("cpu"))
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    inside = model.state_dict()

    def named(name: str) -> str:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, inside)
        return renamed if converter is None and renamed in inside else name

    return {name: named(name) for name in stored}
