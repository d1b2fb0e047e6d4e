"""What a model's decoder layers are made of, found out from transformers' own classes.

One layer of each kind is run on the meta device with a hook on each linear map: those that are called with the same
tensor share an input. What is not understood is refused with its name: nothing is pruned on a guess.
"""

import copy
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer

from shardprune.errors import InputError
from shardprune.model.carried import (
    CHOSEN,
    OWN,
    SHARED,
    TOKENS,
    Carried,
    frame_inputs,
    further_embedding,
    parameters_of,
)
from shardprune.model.config_file import in_one_line
from shardprune.model.experts import idle_experts, mixtures, run_on_meta
from shardprune.model.families import FAMILIES, NO_STRUCTURES, Family, LayerKind, Structures
from shardprune.model.left_dense import not_run, pruned_of
from shardprune.model.stand_ins import Arguments, as_returned, standing_in
from shardprune.model.stored_names import joins

SEQLEN = 8  # tokens of the sequence on which a layer is run


def family_of_model(model: PreTrainedModel) -> Family:
    """Return the decoder layers of an empty model, and the modules of each kind of them.

    Raises:
        InputError: they are not such that they can be pruned one layer at a time.
    """
    structures = FAMILIES.get(model.config.model_type, NO_STRUCTURES)
    try:
        path, layers = _decoder_layers(model)
        _check_stored_as_they_are(model, path)
        kinds, carried = _kinds(model, layers, structures)
    except InputError:
        raise
    except Exception as error:  # the model's own code, which may not run without values
        raise _refused(f"its decoder layers do not run alone: {in_one_line(error)}") from error
    return Family(path, kinds, structures, carried)


def _refused(reason: str) -> InputError:
    return InputError("model", f"cannot be pruned: {reason}")


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of a model's decoder layers and its path."""
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    inside = {id(part) for part in model.get_decoder().modules()}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if path and id(module) in inside and isinstance(module, nn.ModuleList)
    ]
    for own in (count, getattr(config, "num_layers", count)):  # of LongCat's layers, each has two attentions
        for path, module in lists:
            if len(module) == own and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
                return path, module
    raise _refused(f"{type(model).__name__} has no list of {count} decoder layers")


def _check_stored_as_they_are(model: PreTrainedModel, path: str) -> None:
    """Check that transformers computes no parameter of the layers but those of experts from other tensors, unless it
    puts them one below the other.

    Raises:
        InputError: it does; names the parameter and the tensors.
    """
    inside = [name for name in model.state_dict() if name.startswith(f"{path}.")]
    converters = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightConverter)]
    for one in converters:
        if joins(one):
            continue
        made = [name for name in inside if name.endswith(tuple(one.target_patterns))]
        if made:
            parts = ", ".join(one.source_patterns)
            raise _refused(f"{made[0]} is not stored as it is, transformers makes it from {parts}")


def _kinds(
    model: PreTrainedModel, layers: nn.ModuleList, structures: Structures
) -> tuple[tuple[LayerKind, ...], Carried]:
    """Return the kind of each layer, and what passes from one to the next; layers of one class with the same tensors,
    which share keys and values in the same way, are of one kind.

    The model calls its layers one after the other. The first one of each kind is run on the meta device then, with what
    the model passes to it. Layers that it does not call, for there are no images, do nothing for text.
    """
    found: dict[Any, LayerKind] = {}
    names = parameters_of(layers[0])
    passed: dict[int, dict[str, Any]] = {}  # to each layer that is called, by name
    chosen: list[Any] = []  # by the last layer that was run
    own = [
        (
            type(layer),
            _sharing(layer) if SHARED in names else None,
            *((name, *tensor.shape) for name, tensor in layer.state_dict().items()),
        )
        for layer in layers
    ]

    def pass_on(index: int, *positional: Any, **keywords: Any) -> Any:
        hidden, arguments = Arguments.split(positional, keywords)
        if TOKENS in names:
            arguments.keywords[TOKENS] = torch.zeros(1, SEQLEN, dtype=torch.long, device=hidden.device)
        passed[index] = {
            names[0]: hidden,
            **dict(zip(names[1:], arguments.positional, strict=False)),
            **arguments.keywords,
        }
        if own[index] not in found:
            found[own[index]], output = _kind(originals[index], hidden, arguments, structures)
            chosen[:] = output[1:] if CHOSEN in names else []
        returned = as_returned(hidden, found[own[index]].returned)
        return (returned[0], *chosen) if chosen else returned

    originals = [copy.copy(layer) for layer in layers]  # which have their own forward pass all the while
    stand_ins = [partial(pass_on, index) for index in range(len(layers))]
    with small_parts_blank(model, layers) as blank, torch.no_grad(), standing_in(layers, stand_ins):
        model.base_model(inputs_embeds=blank, use_cache=False, **frame_inputs(model, blank))
    if not passed:
        raise LookupError("the model calls none of its layers")
    carried = _carried(model, names, list(passed.values()))
    resting = [index for index in range(len(layers)) if index not in passed]
    if resting and not carried.stateless:  # of which a layer may have to pass something on
        raise LookupError(f"the model does not call its layer {resting[0]}")
    idle = {own[index]: not_run(layers[index]) for index in resting}
    return tuple((found if index in passed else idle)[key] for index, key in enumerate(own)), carried


def _sharing(layer: nn.Module) -> tuple[Any, ...]:
    """Return how a layer shares keys and values with others: whether it keeps, or takes them, and under which name."""
    marks = ("store_full_length_kv", "is_kv_shared_layer", "layer_type")
    return next((tuple(getattr(m, mark) for mark in marks) for m in layer.modules() if hasattr(m, marks[0])), ())


def _carried(model: PreTrainedModel, names: tuple[str, ...], passed: list[dict[str, Any]]) -> Carried:
    """Return what passes from layer to layer, by the arguments of each."""
    hidden, first = passed[0][names[0]], passed[0]
    own = first.get(OWN)
    within = hidden.dim() == 4 and hidden.shape[:2] == (1, SEQLEN)
    return Carried(
        hidden=hidden.shape[-1],
        streams=hidden.shape[2 if within else 0] if hidden.dim() == 4 else 0,
        within=within,
        own=0 if own is None else own.shape[-1],
        layers=len(passed),
        shared={name: (keys.shape[1], keys.shape[3]) for name, (keys, _) in (first.get(SHARED) or {}).items()},
        chosen=model.config.index_topk if CHOSEN in names else 0,
        tokens=TOKENS in names,
        names=names,
    )


def _kind(layer: nn.Module, hidden: Tensor, arguments: Arguments, structures: Structures) -> tuple[LayerKind, Any]:
    """Return the kind of a layer, and its output on the meta device."""
    calls, output, chosen = run_layer_on_meta(layer, hidden, arguments)
    maps = tuple(tuple(dict.fromkeys(names)) for names in calls)
    called = {name for names in maps for name in names}
    inputs, kept = pruned_of(layer, maps, structures.rows.keys() | structures.columns.keys())
    kind = LayerKind(
        maps=maps,
        inputs=inputs,
        attention=_attention(layer, called),
        mixtures=chosen,
        idle=max((idle_experts(layer.get_submodule(path)) for path in chosen), default=0),
        structures=structures,
        returned=len(output) if isinstance(output, tuple) else 0,
        kept=kept,
    )
    return kind, output


@contextmanager
def small_parts_blank(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[Tensor]:
    """Make the small parts of a model's frame (learned positions, norms) zeros for as long as it runs without tokens;
    yield hidden states of zeros [1, SEQLEN, hidden] that enter it."""
    embedding = model.get_input_embeddings()
    large = {id(embedding.weight), id(model.get_output_embeddings().weight), id(further_embedding(model))}
    left = large | {id(parameter) for parameter in layers.parameters()}
    held = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and id(parameter) not in left
    ]
    device = next((buffer.device for buffer in model.buffers()), torch.device("cpu"))
    try:
        for module, leaf, parameter in held:
            zeros = torch.zeros_like(parameter, device=device)
            module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)
        yield torch.zeros(1, SEQLEN, embedding.embedding_dim, dtype=embedding.weight.dtype, device=device)
    finally:
        for module, leaf, parameter in held:
            module._parameters[leaf] = parameter


def run_layer_on_meta(
    layer: nn.Module, hidden: Tensor, arguments: Arguments
) -> tuple[list[list[str]], Any, dict[str, int]]:
    """Run a layer on the meta device; return its linear maps in the order of their calls, those with the same input
    together, its output, and how many experts each of its mixtures lets a token pass through."""
    positional, keywords = tree_map_only(
        Tensor, lambda tensor: tensor.to("meta"), (arguments.positional, arguments.keywords)
    )
    alone = copy.deepcopy(layer).to("meta")
    chosen: dict[str, int] = {}

    def route(path: str, mixture: nn.Module, hidden: Tensor, experts: Tensor, *_weights: Tensor) -> Tensor:
        chosen[path] = experts.shape[-1]
        return run_on_meta(mixture, hidden)

    for path, mixture in mixtures(alone).items():
        mixture.__dict__["forward"] = partial(route, path, mixture)
    seen: dict[tuple[Any, ...], list[str]] = {}
    alive = []  # a freed tensor's place is another's soon

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        given = inputs[0]
        alive.append(given)
        place = given.untyped_storage()._cdata, given.storage_offset(), given.shape, given.stride(), given._version
        seen.setdefault(place, []).append(name)

    for path, module in alone.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _module, inputs, path=path: note(path, inputs))
    with torch.no_grad():
        output = alone(hidden.to("meta"), *positional, **keywords)
    return list(seen.values()), output, chosen


def _attention(layer: nn.Module, maps: Collection[str]) -> frozenset[str]:
    """Return the linear maps of the parts of a layer that take an attention mask; a list of parts is one."""
    masked = {
        name
        for name, part in layer.named_children()
        for one in (part if isinstance(part, nn.ModuleList) else (part,))
        if "attention_mask" in inspect.signature(one.forward).parameters
    }
    return frozenset(name for name in maps if name.split(".")[0] in masked)
