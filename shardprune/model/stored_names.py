"""The names of a checkpoint's tensors, in its files and in the model that transformers builds of them."""

import re
from collections.abc import Iterable

import torch
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from shardprune.model.empty_model import empty_model
from shardprune.model.experts import STACKS


def names_in_model(config: PretrainedConfig, stored: Iterable[str]) -> dict[str, str]:
    """Return the names of stored tensors in the causal language model by their stored names, as transformers has them.

    The tensors of experts, of which transformers makes one parameter, are the weights of their parts. Any other tensor
    that it converts, and does not only rename, has no name in the model, and keeps its own.

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
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, inside)
        if renamed not in inside:
            return name
        return renamed if pattern is None else _part(name, renamed, pattern, converters) or name

    return {name: named(name) for name in stored}


def _part(name: str, stack: str, pattern: str, converters: list[WeightConverter]) -> str | None:
    """Return the name of a part of an expert, whose weight is the stored tensor `name`; None where it is not.

    Args:
        stack: the parameter that transformers makes of all experts.
        pattern: of the converter that takes the tensor, with an asterisk for the number of the expert.
    """
    path, _, leaf = stack.rpartition(".")
    converter = next(one for one in converters if pattern in one.source_patterns)
    merging = [type(operation) for operation in converter.operations]
    parts, number = STACKS.get(leaf, ()), re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if number is None or len(parts) != len(converter.source_patterns):
        return None
    if merging != [MergeModulelist, Concatenate][: len(parts)]:
        return None
    return f"{path}.{number[1]}.{parts[converter.source_patterns.index(pattern)]}.weight"
