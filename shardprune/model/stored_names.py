"""The names of a checkpoint's tensors, in its files and in the model that transformers builds of them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from transformers import PretrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightTransform,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from shardprune.errors import InputError
from shardprune.model.causal_class import WITHOUT_HEAD
from shardprune.model.empty_model import empty_model
from shardprune.model.experts import STACKS, experts_of, is_mixture, layout_of
from shardprune.storage.joined_tensors import Joined
from shardprune.storage.safetensors_file import Entry
from shardprune.storage.stacks import Layout, Place, Slice


def places_in_model(config: PretrainedConfig, stored: Mapping[str, Entry]) -> Iterator[tuple[Place, str]]:
    """Yield the places of tensors in the files, each with its name in the causal language model, as transformers has
    them.

    The tensors of experts, of which transformers makes one parameter, are the weights of their parts; where a file
    holds that parameter as a whole, the parts are slices of it. Tensors that it joins to one parameter have one place.
    Any other tensor that transformers converts, and does not only rename, has no name in the model, and keeps its own.

    Raises:
        InputError: transformers builds no model from the config, or such a whole is of more experts than have weights.
    """
    classes = [mapping.get(type(config), None) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING)]
    known = [config.model_type, *(one.__name__ for one in classes if one)]
    whole = _conversions_of_whole(config)
    converted = any(get_checkpoint_conversion_mapping(one) for one in known) or whole
    # Files of the model without its head have names without its prefix, as BLOOM's do.
    prefixed = not classes[0] or any(name.startswith(f"{classes[0].base_model_prefix}.") for name in stored)
    if prefixed and not converted and not any(_may_be_stack(name, entry) for name, entry in stored.items()):
        yield from ((Place(name), name) for name in stored)  # most classes: no model need be built
        return
    model = empty_model(config, torch.float32, torch.device("cpu"))
    transforms = [*get_model_conversion_mapping(model), *whole]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    inside = model.state_dict()
    mixtures = {path: module for path, module in model.named_modules() if is_mixture(module)}
    joined: dict[str, dict[int, str]] = {}  # the stored names of parts of a parameter, by their number
    for name, entry in stored.items():
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, inside)
        path, _, leaf = renamed.rpartition(".")
        if renamed in inside and path in mixtures and leaf in STACKS and len(entry.shape) == 3:
            if entry.shape[0] > experts_of(mixtures[path]):  # LongCat's, not as its own files have them
                reason = "holds matrices of experts that have no weights; save each expert's tensors by themselves"
                raise InputError("model", f"tensor {name} {[*entry.shape]} {reason}")
            turned = pattern is not None and _transposes(pattern, converters)
            yield from _slices(
                name, entry.shape, renamed, tuple(inside[renamed].shape), layout_of(mixtures[path]), turned
            )
        elif renamed not in inside:
            yield Place(name), name
        elif pattern is not None and joins(own := _converter_of(pattern, converters)):
            joined.setdefault(renamed, {})[own.source_patterns.index(pattern)] = name
        else:
            yield Place(name), renamed if pattern is None else _part(name, renamed, pattern, converters) or name
    for parameter, parts in joined.items():
        names = tuple(parts[place] for place in sorted(parts))
        alike = {(stored[name].dtype, stored[name].shape[1:]) for name in names}
        if len(alike) == 1 and sum(stored[name].shape[0] for name in names) == inside[parameter].shape[0]:
            rows = tuple(stored[name].shape[0] for name in names)
            yield Place(names[0], joined=Joined(names, rows)), parameter
        else:
            yield from ((Place(name), name) for name in names)  # which are not that parameter


def joins(converter: WeightConverter) -> bool:
    """Return whether a converter puts a few tensors one below the other, and does nothing else."""
    below = [type(one) is Concatenate and one.dim == 0 for one in converter.operations] == [True]
    return below and not any("*" in pattern for pattern in converter.source_patterns)


def _conversions_of_whole(config: PretrainedConfig) -> list[WeightTransform]:
    """Return the conversions that transformers has for the whole model of which a config describes the text part, and
    not for that part; patterns begin within a layer."""
    if config.model_type not in WITHOUT_HEAD:
        return []
    return get_checkpoint_conversion_mapping(config.model_type.removesuffix("_text")) or []


def _may_be_stack(name: str, entry: Entry) -> bool:
    """Return whether a stored tensor may hold all experts of a layer."""
    return len(entry.shape) == 3 and name.rpartition(".")[2] in STACKS


def _slices(
    name: str, shape: tuple[int, ...], stack: str, own_shape: tuple[int, ...], layout: Layout, turned: bool
) -> Iterator[tuple[Place, str]]:
    """Yield the places of the parts of all experts in the stored tensor `name` of a shape, with their names.

    Args:
        stack: the parameter that transformers makes of it, of shape `own_shape`, in which the matrices have a layout.
        turned: it transposes stored matrices that are the other way round.
    """
    path, _, leaf = stack.rpartition(".")
    if turned and shape != own_shape and shape == (own_shape[0], own_shape[2], own_shape[1]):
        layout = replace(layout, transposed=not layout.transposed)
    elif shape != own_shape:
        yield Place(name), name  # which is not a tensor of the model
        return
    for expert in range(shape[0]):
        for place, part in enumerate(STACKS[leaf]):
            own = Slice(shape, expert, place, len(STACKS[leaf]), layout)
            yield Place(name, own), f"{path}.{expert}.{part}.weight"


def _converter_of(pattern: str, converters: list[WeightConverter]) -> WeightConverter:
    """Return the converter that takes tensors whose names match a pattern of its."""
    return next(one for one in converters if pattern in one.source_patterns)


def _transposes(pattern: str, converters: list[WeightConverter]) -> bool:
    """Return whether a converter does nothing but transpose tensors that are the other way round."""
    converter = _converter_of(pattern, converters)
    return [type(operation) for operation in converter.operations] == [Transpose]


def _part(name: str, stack: str, pattern: str, converters: list[WeightConverter]) -> str | None:
    """Return the name of a part of an expert, whose weight is the stored tensor `name`; None where it is not.

    Args:
        stack: the parameter that transformers makes of all experts.
        pattern: of the converter that takes the tensor, with an asterisk for the number of the expert.
    """
    path, _, leaf = stack.rpartition(".")
    converter = _converter_of(pattern, converters)
    merging = [type(operation) for operation in converter.operations]
    plain = re.escape(pattern.replace(r"\.", "."))  # some patterns have their dots escaped, and others not
    parts, number = STACKS.get(leaf, ()), re.search(plain.replace(r"\*", r"(\d+)"), name)
    if number is None or len(parts) != len(converter.source_patterns):
        return None
    if merging != [MergeModulelist, Concatenate][: len(parts)]:
        return None
    return f"{path}.{number[1]}.{parts[converter.source_patterns.index(pattern)]}.weight"
