"""The shape of a model (layers, key/value groups, neurons) and its config.

A *group* is a key/value head with the query heads that read it (one under multi-head attention). Groups are removed as
a whole, so that the number of query heads per key/value head stays.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from shardprune.model.families import Structures, Unit, structures_of

FEWEST_GROUPS = 2
FEWEST_LAYERS = 2
OF_A_FILE = ("_name_or_path", "architectures", "dtype", "transformers_version")  # describe the file, not the model


@dataclass(frozen=True)
class Widths:
    """The numbers of groups and neurons of every layer."""

    groups: int
    neurons: int


@dataclass(frozen=True)
class Heads:
    """The composition of a group: `queries` query heads and one key/value head, of `dim` rows each."""

    queries: int
    dim: int

    def rows(self, unit: Unit) -> int:
        """Return the number of rows (or columns) of a projection that belong to one structure."""
        return {"query": self.queries * self.dim, "key": self.dim, "neuron": 1}[unit]


def widths_of(config: PretrainedConfig) -> Widths:
    """Return the widths of a config's layers."""
    return Widths(_key_heads(config), getattr(config, _structures_of(config).neurons))


def heads_of(config: PretrainedConfig) -> Heads:
    """Return the composition of a config's groups."""
    dim = None if _structures_of(config).fixed_heads else getattr(config, "head_dim", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads // _key_heads(config), dim)


def _structures_of(config: PretrainedConfig) -> Structures:
    return structures_of(config.model_type, "structured")


def _key_heads(config: PretrainedConfig) -> int:
    """The number of key heads; a class without a field for it has as many as query heads, whatever a config says."""
    known = hasattr(type(config), "num_key_value_heads")
    return (config.num_key_value_heads if known else None) or config.num_attention_heads


def changes(config: PretrainedConfig, widths: Widths, layers: Sequence[int]) -> dict[str, Any]:
    """Return the config fields that change if a model keeps some of its layers and gets other widths.

    A Llama config rejects a number of heads that does not divide the hidden size. Mistral's model is the same
    computation with a separate head width and no such check, so that such a Llama is saved as a Mistral without a
    sliding window.

    Args:
        layers: indices of the kept layers.
    """
    structures, heads = _structures_of(config), heads_of(config)
    fields: dict[str, Any] = {}
    if len(layers) != config.num_hidden_layers:
        fields["num_hidden_layers"] = len(layers)
        if types := getattr(config, "layer_types", None):
            fields["layer_types"] = [types[index] for index in layers]
        first = getattr(config, "max_window_layers", None)  # without a window: for readers that look at no types
        if first is not None and first <= config.num_hidden_layers:
            fields["max_window_layers"] = sum(index < first for index in layers)
    before = widths_of(config)
    if widths.neurons != before.neurons:
        fields[structures.neurons] = widths.neurons
    if widths.groups != before.groups:
        fields["num_attention_heads"] = widths.groups * heads.queries
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = widths.groups
        fields["head_dim"] = heads.dim
        if config.model_type == "llama" and config.hidden_size % fields["num_attention_heads"]:
            twin = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
            # transformers loads another tokenizer for Mistrals of old versions.
            twin["transformers_version"] = transformers.__version__
            fields = {**_model_fields(config), **fields, **twin}
    return fields


def _model_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return all fields of a config that describe the model. Defaults are included: another class has other
    defaults.
    """
    return {name: value for name, value in config.to_dict().items() if name not in OF_A_FILE}


def reshaped(config: PretrainedConfig, widths: Widths, layers: Sequence[int] | None = None) -> PretrainedConfig:
    """Return the config of a model with other widths and some of its layers.

    Raises:
        ValueError: transformers rejects such a config.
    """
    fields = changes(config, widths, range(config.num_hidden_layers) if layers is None else layers)
    if fields.get("num_attention_heads") and _structures_of(config).fixed_heads:
        raise ValueError("the family's code takes the number of heads and their width for one number")
    values = {**config.to_dict(), **fields}
    if values["model_type"] != config.model_type and (config.attention_bias or config.mlp_bias):
        raise ValueError("Mistral has no biases")
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # transformers checks a config in many ways, each with an error of its own
        raise ValueError(str(error)) from error


def possible_groups(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the numbers of groups that the family's config allows, ascending; at least two stay."""
    before = widths_of(config)

    def possible(groups: int) -> bool:
        try:
            reshaped(config, Widths(groups, before.neurons))
        except ValueError:
            return False
        return True

    fewer = [groups for groups in range(FEWEST_GROUPS, before.groups) if possible(groups)]
    return (*fewer, before.groups)


@dataclass(frozen=True)
class Costs:
    """Parameters of a group, of a neuron, and of the rest of a layer (norms)."""

    group: int
    neuron: int
    rest: int

    def layer(self, widths: Widths) -> int:
        """Return the parameters of a layer."""
        return widths.groups * self.group + widths.neurons * self.neuron + self.rest


def costs_of(config: PretrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> Costs:
    """Count the parameters of a layer's structures.

    Args:
        tensors: shapes by name within the layer (`self_attn.q_proj.weight`): of all its parameters, or of the
            projections' weights alone.
    """
    structures, heads, widths = _structures_of(config), heads_of(config), widths_of(config)
    counts = {"query": 0, "key": 0, "neuron": 0}
    rest = 0
    for name, shape in tensors.items():
        projection, _, leaf = name.rpartition(".")
        whole = math.prod(shape)
        if projection in structures.rows:
            units = structures.rows[projection]
            rows = {unit: heads.rows(unit) for unit in units}
            for unit in units:
                counts[unit] += whole // shape[0] * rows[unit]
        elif projection in structures.columns and leaf == "weight":
            unit = structures.columns[projection]
            counts[unit] += whole // shape[1] * heads.rows(unit)
        else:
            rest += whole
    costs = Costs(counts["query"] + counts["key"], counts["neuron"], rest)
    assert costs.layer(widths) == sum(map(math.prod, tensors.values())), "structures do not make up the layer"
    return costs
