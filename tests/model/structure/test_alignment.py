"""Widths that kernels and tensor parallelism like."""

import pytest
import transformers

from shardprune.errors import InputError
from shardprune.model.structure.alignment import MULTIPLES, degrees, narrowed_by
from shardprune.model.structure.shape import Widths

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}


def narrowed(sizes, share, multiple="auto", parallel=1):
    hidden, neurons, dim = sizes["hidden_size"], sizes["intermediate_size"], 0
    dim = hidden // sizes["num_attention_heads"]
    config = transformers.Qwen3Config(**sizes, head_dim=dim, vocab_size=64, num_hidden_layers=2)
    rows = {
        "q_proj": hidden,
        "k_proj": dim * sizes["num_key_value_heads"],
        "v_proj": dim * sizes["num_key_value_heads"],
    }
    shapes = {f"self_attn.{name}": (count, hidden) for name, count in rows.items()}
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.down_proj": (hidden, neurons)}
    shapes |= {f"mlp.{name}": (neurons, hidden) for name in ("gate_proj", "up_proj")}
    return narrowed_by(config, shapes, share, multiple, parallel)


@pytest.mark.parametrize("sizes", [LLAMA_8B, LLAMA_70B], ids=["8B", "70B"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("parallel", [1, 2, 8])
def test_the_largest_multiple_that_rounds_little(sizes, share, parallel):
    exact = narrowed(sizes, share, 1, parallel)
    found = narrowed(sizes, share, parallel=parallel)
    gone = sizes["intermediate_size"] - exact.neurons
    assert found.groups == exact.groups

    def rounded(size):  # of a plain formulation
        return round(exact.neurons / size) * size

    fitting = [size * parallel for size in MULTIPLES if sizes["intermediate_size"] % (size * parallel) == 0]
    good = [size for size in fitting if abs(rounded(size) - exact.neurons) <= 0.05 * gone]
    assert found.neurons == rounded(good[0] if good else fitting[-1])
    assert found.neurons % (32 * parallel) == 0
    assert found.groups % parallel == 0 or parallel % found.groups == 0


QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}


def test_query_heads_and_given_multiples_divide_over_the_devices():
    assert narrowed(QWEN_7B, 0.6, parallel=2).groups == 2
    assert narrowed(QWEN_7B, 0.6, parallel=4).groups == 4  # of 2 the 14 heads would not
    assert narrowed(QWEN_7B, 0.3, multiple=1, parallel=4).neurons % 4 == 0
    assert narrowed(QWEN_7B, 0.3, multiple=6, parallel=4).neurons % 12 == 0
    with pytest.raises(InputError, match="^tensor_parallel: 8 is not allowed"):
        narrowed(QWEN_7B, 0.3, parallel=8)


def test_never_below_32_unless_asked():
    assert narrowed(SMALL, 0.03) == Widths(4, 480)
    assert narrowed(SMALL, 0.03, multiple=1).neurons % 32
    assert narrowed(SMALL, 0.03, multiple=8).neurons % 8 == 0


def test_a_model_whose_own_width_is_no_multiple_is_left_to_the_neuron():
    assert narrowed(TINY, 0.2) == narrowed(TINY, 0.2, multiple=1)


def test_groups_divide_over_the_devices():
    assert narrowed(LLAMA_8B, 0.5, 1).groups == 4
    assert narrowed(LLAMA_8B, 0.4, 1).groups == 5
    assert narrowed(LLAMA_8B, 0.4, parallel=4).groups == 8
    with pytest.raises(InputError, match="tensor_parallel: 3 is not allowed; the model's 8 key/value groups"):
        narrowed(LLAMA_8B, 0.4, parallel=3)


def test_degrees():
    assert degrees(8, 32, 14336) == [1, 2, 4, 8, 16]
    assert degrees(6, 24, 11520) == [1, 2]
    assert degrees(8, 32, 375) == [1]
    assert degrees(2, 28, 18944) == [1, 2, 4]
