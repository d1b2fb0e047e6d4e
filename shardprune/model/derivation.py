"""What a model's decoder layers are made of, found out from transformers' own classes.

One layer is run on the meta device with a hook on each linear map: those that are called with the same tensor share an
input. What is not understood is refused with its name: nothing is pruned on a guess, and no matrix is left out in
silence.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from shardprune.errors import InputError
from shardprune.model.config_file import in_one_line
from shardprune.model.experts import chooses, mixtures, run_on_meta
from shardprune.model.families import FAMILIES, NO_STRUCTURES, Family
from shardprune.model.stand_ins import Arguments, standing_in

SEQLEN = 8  # tokens of the sequence on which a layer is run


def family_of_model(model: PreTrainedModel) -> Family:
    """Return the modules of an empty model's decoder layers.

    Raises:
        InputError: they are not such that every matrix of theirs can be pruned one layer at a time.
    """
    try:
        path, layers = _decoder_layers(model)
        _check_kinds(layers)
        hidden, arguments = _first_call(model, layers)
        calls, output = _run_on_meta(layers[0], hidden, arguments)
    except InputError:
        raise
    except Exception as error:  # the model's own code, which may not run without values
        raise _refused(f"its decoder layers do not run alone: {in_one_line(error)}") from error
    inputs = tuple(tuple(dict.fromkeys(names)) for names in calls)
    _check_matrices(layers[0], {name for names in inputs for name in names})
    return Family(
        layers=path,
        inputs=inputs,
        attention=_attention(layers[0], inputs),
        mixtures=tuple(mixtures(layers[0])),
        structures=FAMILIES.get(model.config.model_type, NO_STRUCTURES),
        returns_tuple=isinstance(output, tuple),
    )


def _refused(reason: str) -> InputError:
    return InputError("model", f"cannot be pruned: {reason}")


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of a model's decoder layers and its path."""
    count = model.config.get_text_config().num_hidden_layers
    decoder = model.get_decoder()
    for path, module in model.named_modules():
        if not path or not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        inside = any(module is part for part in decoder.modules())
        if inside and all(isinstance(layer, GradientCheckpointingLayer) for layer in module):
            return path, module
    raise _refused(f"{type(model).__name__} has no list of {count} decoder layers")


def _check_kinds(layers: nn.ModuleList) -> None:
    """Check that all layers have the same tensors."""
    shapes = [{name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} for layer in layers]
    for index, own in enumerate(shapes):
        if differing := next((name for name in {**own, **shapes[0]} if own.get(name) != shapes[0].get(name)), None):
            has = [f"{list(some[differing])}" if differing in some else "nothing" for some in (shapes[0], own)]
            reason = f"layer 0 has {has[0]} where layer {index} has {has[1]}"
            raise _refused(f"its layers are of several kinds, which is not supported yet: {differing}, {reason}")


def _check_matrices(layer: nn.Module, called: set[str]) -> None:
    """Check that every matrix of a layer is the weight of a linear map that has been called."""
    for path, module in layer.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.dim() < 2:
                continue
            name = f"{path}.{leaf}" if path else leaf
            if chooses(module, layer):
                continue
            if not isinstance(module, nn.Linear):
                raise _refused(f"{name} {list(parameter.shape)} of its layers is not the weight of an nn.Linear")
            if len(parameter) == 1:
                raise _refused(f"{path} of its layers is a gate, which is not supported yet")
            if path not in called:
                raise _refused(f"{path} of its layers is not called as a module")


class _Reached(Exception):
    """Ends a model's forward pass at its first layer."""

    def __init__(self, hidden: Tensor, arguments: Arguments) -> None:
        super().__init__("reached")
        self.hidden, self.arguments = hidden, arguments


def _first_call(model: PreTrainedModel, layers: nn.ModuleList) -> tuple[Tensor, Arguments]:
    """Return the hidden states and arguments with which a model calls its first layer.

    The small parts of the frame (learned positions, norms) are zeros for as long as it runs.
    """

    def reached(*positional: Any, **keywords: Any) -> Any:
        raise _Reached(*Arguments.split(positional, keywords))

    embedding = model.get_input_embeddings()
    large = {id(embedding.weight), id(model.get_output_embeddings().weight)}
    inside = {id(parameter) for parameter in layers.parameters()}
    held = [
        (module, leaf, parameter)
        for module in model.modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and id(parameter) not in large | inside
    ]
    device = next((buffer.device for buffer in model.buffers()), torch.device("cpu"))
    blank = torch.zeros(1, SEQLEN, embedding.embedding_dim, dtype=embedding.weight.dtype, device=device)
    try:
        for module, leaf, parameter in held:
            zeros = torch.zeros_like(parameter, device=device)
            module._parameters[leaf] = nn.Parameter(zeros, requires_grad=False)
        with torch.no_grad(), standing_in(layers, [reached] * len(layers)):
            model.base_model(inputs_embeds=blank, use_cache=False)
    except _Reached as end:
        return end.hidden, end.arguments
    finally:
        for module, leaf, parameter in held:
            module._parameters[leaf] = parameter
    raise LookupError("the model does not call its layers")


def _run_on_meta(layer: nn.Module, hidden: Tensor, arguments: Arguments) -> tuple[list[list[str]], Any]:
    """Run a layer on the meta device; return its linear maps in the order of their calls, those with the same input
    together, and its output."""
    positional, keywords = tree_map_only(
        Tensor, lambda tensor: tensor.to("meta"), (arguments.positional, arguments.keywords)
    )
    alone = copy.deepcopy(layer).to("meta")
    for mixture in mixtures(alone).values():
        mixture.__dict__["forward"] = lambda hidden, *_routing, mixture=mixture: run_on_meta(mixture, hidden)
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
    return list(seen.values()), output


def _attention(layer: nn.Module, inputs: tuple[tuple[str, ...], ...]) -> frozenset[str]:
    """Return the projections of the parts of a layer that take an attention mask."""
    masked = {
        name for name, part in layer.named_children() if "attention_mask" in inspect.signature(part.forward).parameters
    }
    return frozenset(name for names in inputs for name in names if name.split(".")[0] in masked)
