"""What structures consist of, how many of them a model can have, and the configs that say so."""

import math

import pytest
import transformers
from transformers import PretrainedConfig

from shardprune.model.skeleton import Skeleton
from shardprune.model.structure.shape import (
    Heads,
    Widths,
    changes,
    costs_of,
    heads_of,
    possible_groups,
    reshaped,
    widths_of,
)
from tests.support.tiny import CONFIGS, GROUPED

TABLES = {**{f"{family}, two groups": CONFIGS[family] for family in CONFIGS}, **GROUPED}
FACTORS = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}


def config_of(name: str, **fields) -> PretrainedConfig:
    class_name, values = TABLES[name]
    return getattr(transformers, class_name)(**{**values, **fields})


def layer_shapes(config: PretrainedConfig, weights_only: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the first layer, or of its projections' weights."""
    skeleton = Skeleton(config, "cpu")
    if weights_only:
        return {f"{name}.weight": shape for name, shape in skeleton.projection_shapes(0).items()}
    prefix = f"{skeleton.family.layers}.0."
    return {name.removeprefix(prefix): shape for name, shape in skeleton.layer_tensors(0).items()}


def size(config: PretrainedConfig, weights_only: bool = False) -> int:
    return sum(map(math.prod, layer_shapes(config, weights_only).values()))


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_costs_make_up_a_layer_of_any_widths(name, weights_only):
    config = config_of(name)
    before, costs = widths_of(config), costs_of(config, layer_shapes(config, weights_only))
    assert costs.layer(before) == size(config, weights_only)
    assert (costs.rest == 0) == weights_only
    narrower = [Widths(groups, before.neurons - 5) for groups in possible_groups(config)]
    for widths in narrower:
        assert costs.layer(widths) == size(reshaped(config, widths), weights_only)
    assert len({costs.layer(widths) for widths in narrower}) == len(narrower)


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("llama", {}, (2, 3, 4)),
        ("llama, two groups", {}, (2, 3, 4)),  # of one query head each
        ("llama-3.1, two groups", {}, (2,)),
        ("llama", {"attention_bias": True}, (2, 4)),  # no Mistral has biases, and six heads do not divide 32
        ("llama", {"mlp_bias": True}, (2, 4)),
        ("llama", {"num_attention_heads": 9, "num_key_value_heads": 9, "hidden_size": 36}, (2, 3, 4, 5, 6, 7, 8, 9)),
        ("mistral", {}, (2, 3, 4)),
        ("qwen2", {}, (2, 3, 4)),
        ("qwen3", {}, (2, 3, 4)),
        ("gemma2", {}, (2, 4)),  # the heads divide the hidden size
        ("gemma2", {"num_key_value_heads": 8}, (2, 4, 8)),
        ("phi3", {}, (2, 3, 4)),
        ("phi3", {"rope_parameters": FACTORS}, (3, 4)),  # 32 // 4 heads have not as many frequencies as factors
        ("opt", {}, (4,)),
        ("opt-350m", {}, (4,)),
    ],
)
def test_possible_numbers_of_groups(name, fields, expected):
    assert possible_groups(config_of(name, **fields)) == expected


def test_a_group_is_a_key_value_head_with_its_query_heads():
    assert heads_of(config_of("qwen2")) == Heads(queries=2, dim=4)
    assert heads_of(config_of("llama, two groups")) == Heads(queries=1, dim=8)
    assert heads_of(config_of("opt")) == Heads(queries=1, dim=8)
    ignored = {"num_key_value_heads": 2, "head_dim": 16}  # by its code
    assert heads_of(config_of("opt", **ignored)) == Heads(queries=1, dim=8)
    assert widths_of(config_of("opt", **ignored)) == widths_of(config_of("opt"))
    assert [heads_of(config_of("phi3")).rows(unit) for unit in ("query", "key", "neuron")] == [8, 4, 1]


HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
AS_MISTRAL = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


@pytest.mark.parametrize(
    ("name", "widths", "expected"),
    [
        ("llama", Widths(4, 48), {}),
        ("llama", Widths(4, 40), {"intermediate_size": 40}),
        ("llama", Widths(3, 48), {**HEADS, **AS_MISTRAL}),
        (
            "llama",
            Widths(2, 47),
            {**HEADS, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 47},
        ),
        ("mistral", Widths(3, 48), HEADS),
        ("qwen2", Widths(3, 48), HEADS),
        ("opt", Widths(4, 40), {"ffn_dim": 40}),
    ],
)
def test_only_the_fields_that_must_change_do(name, widths, expected):
    config = config_of(name)
    found = changes(config, widths, range(4))
    assert expected.items() <= found.items()
    assert found.pop("transformers_version", transformers.__version__) == transformers.__version__
    assert all(value == getattr(config, field) for field, value in found.items() if field not in expected)


def test_reshaped_configs_make_models_of_their_widths():
    config = config_of("llama-3.1")
    other = reshaped(config, Widths(3, 40))
    assert isinstance(other, transformers.MistralConfig)
    assert (other.sliding_window, other.rope_parameters) == (None, config.rope_parameters)
    assert (widths_of(other), heads_of(other)) == (Widths(3, 40), heads_of(config))
    assert layer_shapes(other) == {
        **layer_shapes(config),
        **dict.fromkeys(("self_attn.k_proj.weight", "self_attn.v_proj.weight"), (12, 32)),
        **dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (40, 32)),
        "self_attn.q_proj.weight": (24, 32),
        "self_attn.o_proj.weight": (32, 24),
        "mlp.down_proj.weight": (32, 40),
    }
    assert reshaped(config_of("mistral"), Widths(3, 40)).sliding_window == 8


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_layers_that_stay_keep_their_types(name):
    config = config_of(name)
    assert len(set(config.layer_types)) == 2
    for kept in ([0, 2, 3], [1, 2], [0, 3]):
        other = reshaped(config, widths_of(config), kept)
        assert other.num_hidden_layers == len(kept)
        assert other.layer_types == [config.layer_types[layer] for layer in kept]
        assert Skeleton(other, "cpu").layers == len(kept)
        if name == "qwen2":  # which has two ways to say it
            assert other.max_window_layers == other.layer_types.count("full_attention")
            assert other.layer_types == sorted(other.layer_types)


def test_layers_without_types_only_become_fewer():
    config = config_of("llama")
    assert changes(config, widths_of(config), [0, 3]) == {"num_hidden_layers": 2}
    assert Skeleton(reshaped(config, Widths(3, 40), [0, 3]), "cpu").layers == 2


@pytest.mark.parametrize(
    ("name", "fields", "groups"), [("opt", {}, 3), ("gemma2", {}, 3), ("llama", {"attention_bias": True}, 3)]
)
def test_a_config_that_cannot_be_is_an_error(name, fields, groups):
    with pytest.raises(ValueError):  # noqa: PT011  # transformers' own words
        reshaped(config_of(name, **fields), Widths(groups, 48))
