"""The shape of a model: its layers, its key/value groups and neurons, and the config that says so.

A *group* is a key/value head with the query heads that read it (one of them under multi-head attention);
groups go whole, so that the query heads of a key/value head stay as many.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

from shardprune.model.families import Unit, family_of

FEWEST_GROUPS = 2
FEWEST_LAYERS = 2
OF_A_FILE = ("_name_or_path", "architectures", "dtype", "transformers_version")  # not of the model that a config says


@dataclass(frozen=True)
class Widths:
    """The numbers of groups and of neurons that every layer has."""

    groups: int
    neurons: int


@dataclass(frozen=True)
class Heads:
    """What a group consists of: `queries` query heads and a key/value head, of `dim` rows each."""

    queries: int
    dim: int

    def rows(self, unit: Unit) -> int:
        """How many rows (or columns) of a projection one structure owns there."""
        return {"query": self.queries * self.dim, "key": self.dim, "neuron": 1}[unit]


def widths_of(config: PretrainedConfig) -> Widths:
    """The widths that a config gives every layer."""
    return Widths(_key_heads(config), getattr(config, family_of(config.model_type).neurons))


def heads_of(config: PretrainedConfig) -> Heads:
    """What a config's groups consist of."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(config.num_attention_heads // _key_heads(config), dim)


def _key_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def changes(config: PretrainedConfig, widths: Widths, layers: Sequence[int]) -> dict[str, Any]:
    """The fields of a config that change where a model keeps only some of its layers, with other widths.

    A Llama config refuses a number of heads that does not divide the hidden size. Mistral's is the same
    computation, with the width of a head as a number of its own and nothing to refuse, so that such a Llama
    is saved as a Mistral without a sliding window.

    Args:
        layers: the kept ones, by their index.
    """
    family, heads = family_of(config.model_type), heads_of(config)
    fields: dict[str, Any] = {}
    if len(layers) != config.num_hidden_layers:
        fields["num_hidden_layers"] = len(layers)
        if types := getattr(config, "layer_types", None):
            fields["layer_types"] = [types[index] for index in layers]
    before = widths_of(config)
    if widths.neurons != before.neurons:
        fields[family.neurons] = widths.neurons
    if widths.groups != before.groups:
        fields["num_attention_heads"] = widths.groups * heads.queries
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = widths.groups
        fields["head_dim"] = heads.dim
        if config.model_type == "llama" and config.hidden_size % fields["num_attention_heads"]:
            twin = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
            twin["transformers_version"] = transformers.__version__  # old Mistrals are taken to need another tokenizer
            fields = {**_said(config), **fields, **twin}
    return fields


def _said(config: PretrainedConfig) -> dict[str, Any]:
    """All that a config says about the model, its class's defaults included, which are not those of another class."""
    return {name: value for name, value in config.to_dict().items() if name not in OF_A_FILE}


def reshaped(config: PretrainedConfig, widths: Widths, layers: Sequence[int] | None = None) -> PretrainedConfig:
    """The config of a model with other widths, and with some of its layers only.

    Raises:
        ValueError: transformers takes no such config.
    """
    fields = changes(config, widths, range(config.num_hidden_layers) if layers is None else layers)
    if fields.get("num_attention_heads") and family_of(config.model_type).fixed_heads:
        raise ValueError("the family's code takes the number of heads and their width for one number")
    values = {**config.to_dict(), **fields}
    if values["model_type"] != config.model_type and (config.attention_bias or config.mlp_bias):
        raise ValueError("Mistral has no biases")
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:  # transformers checks a config in many ways, each with an error of its own
        raise ValueError(str(error)) from error


def possible_groups(config: PretrainedConfig) -> tuple[int, ...]:
    """The numbers of groups that the family's config can say, in ascending order; at least two stay."""
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
    """What structures consist of, in parameters: a group, a neuron, and a layer beyond them (norms)."""

    group: int
    neuron: int
    rest: int

    def layer(self, widths: Widths) -> int:
        """The parameters of a layer."""
        return widths.groups * self.group + widths.neurons * self.neuron + self.rest


def costs_of(config: PretrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> Costs:
    """What the structures of a layer consist of.

    Args:
        tensors: shapes by name within the layer (`self_attn.q_proj.weight`): of all its parameters, or of the
            projections' weights alone.
    """
    family, heads, widths = family_of(config.model_type), heads_of(config), widths_of(config)
    counts = {"query": 0, "key": 0, "neuron": 0}
    rest = 0
    for name, shape in tensors.items():
        projection, _, leaf = name.rpartition(".")
        whole = math.prod(shape)
        if projection in family.rows:
            units = family.rows[projection]
            rows = {unit: heads.rows(unit) for unit in units}
            for unit in units:
                counts[unit] += whole // shape[0] * rows[unit]
        elif projection in family.columns and leaf == "weight":
            unit = family.columns[projection]
            counts[unit] += whole // shape[1] * heads.rows(unit)
        else:
            rest += whole
    costs = Costs(counts["query"] + counts["key"], counts["neuron"], rest)
    assert costs.layer(widths) == sum(map(math.prod, tensors.values())), "structures do not make up the layer"
    return costs
