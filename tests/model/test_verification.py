"""A class of models that is met for the first time is checked, and refused if it cannot be run layer by layer."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.stablelm import modeling_stablelm

from shardprune.errors import InputError
from shardprune.model import verification
from shardprune.model.config_file import parse_config
from shardprune.model.opening import open_model
from shardprune.model.verification import check_class, check_class_writes, difference_layer_by_layer, small_config
from tests.support.architectures import CARRYING, DENSE, MIXED, MIXTURES, make_architecture
from tests.support.infinities import FORMS, INFINITE, with_infinities
from tests.support.running import run
from tests.support.tiny import CONFIGS


@pytest.fixture
def unchecked(monkeypatch):
    """As if no test had ever run a class."""
    monkeypatch.setattr(verification, "CHECKED", frozenset())
    monkeypatch.setattr(verification, "ATTENDING", frozenset())
    monkeypatch.setattr(verification, "KEEPING_STATES", frozenset())
    verification._check.cache_clear()
    verification._check_writes.cache_clear()
    yield
    verification._check.cache_clear()
    verification._check_writes.cache_clear()


@pytest.mark.parametrize("model_type", ["apertus", "cohere2", "gemma3_text", "gpt_neox", "opt", "smollm3"])
def test_a_class_that_runs_layer_by_layer_passes(unchecked, model_type):
    values = DENSE.get(model_type) or CONFIGS["opt-350m"][1]
    check_class(AutoConfig.for_model(model_type, **values))


def test_a_layer_that_reads_what_its_arguments_do_not_say_is_refused(unchecked, monkeypatch, tmp_path):
    """The model tells its layers of the tokens, which are not there where a layer runs alone."""
    layer, model, told = modeling_stablelm.StableLmDecoderLayer, modeling_stablelm.StableLmModel, [0.0]
    run, embed = layer.forward, model.forward

    def tells(self, input_ids=None, **arguments):
        told[0] = 0.0 if input_ids is None else input_ids[:, :1, None].float()
        output = embed(self, input_ids=input_ids, **arguments)
        told[0] = 0.0
        return output

    def reads(self, hidden_states, *others, **arguments):
        return run(self, hidden_states + told[0], *others, **arguments)

    path = make_architecture(tmp_path, "stablelm", DENSE["stablelm"])
    open_model(path)
    monkeypatch.setattr(model, "forward", tells)
    monkeypatch.setattr(layer, "forward", reads)
    verification._check.cache_clear()
    reason = "a small model of its class, run layer by layer, gives other logits than as a whole, by up to "
    with pytest.raises(InputError, match=f"^model: cannot be pruned: {reason}"):
        open_model(path)


@pytest.mark.parametrize("model_type", ["bloom", "cohere2", "gemma3_text", "gpt_neox", "opt", "smollm3"])
def test_a_class_that_runs_token_by_token_passes(unchecked, model_type):
    values = DENSE.get(model_type) or CONFIGS["opt-350m"][1]
    check_class_writes(AutoConfig.for_model(model_type, **values))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", INFINITE)
def test_a_class_with_infinite_numbers_in_its_config_passes(unchecked, model_type, form):
    config = parse_config(with_infinities(AutoConfig.for_model(model_type, **MIXED[model_type]), form).encode(), "x")
    assert [*small_config(config).time_step_limit] == [0.0, float("inf")]
    check_class(config)
    check_class_writes(config)


@pytest.mark.parametrize("model_type", ["mamba", "mixtral"])
def test_a_class_without_attention_or_with_experts_writes(unchecked, model_type):
    check_class_writes(AutoConfig.for_model(model_type, **{**MIXED, **MIXTURES}[model_type]))


def test_a_class_that_keeps_states_in_its_layers_does_not_write(unchecked):
    reason = "keeps what it has seen in its layers, where two texts that grow in turn share it; give a text"
    with pytest.raises(InputError, match=f"^calibration: .* run token by token, {reason}$"):
        check_class_writes(AutoConfig.for_model("recurrent_gemma", **MIXED["recurrent_gemma"]))


@pytest.mark.parametrize("model_type", CARRYING)
def test_a_class_that_carries_state_from_layer_to_layer_does_not_write(unchecked, model_type):
    with pytest.raises(InputError, match="^calibration: 'self' is not possible: .*; give a text$"):
        check_class_writes(AutoConfig.for_model(model_type, **CARRYING[model_type]))


def test_a_layer_that_keeps_nothing_of_earlier_tokens_does_not_write(unchecked, monkeypatch, tmp_path):
    layer = modeling_stablelm.StableLmDecoderLayer
    run_layer = layer.forward

    def forgets(self, hidden_states, *others, past_key_values=None, **arguments):
        return run_layer(self, hidden_states, *others, **arguments)

    make_architecture(tmp_path / "model", "stablelm", DENSE["stablelm"])
    monkeypatch.setattr(layer, "forward", forgets)
    reason = "'self' is not possible: a small model of its class, run token by token, gives other logits"
    with pytest.raises(InputError, match=f"^calibration: {reason}"):
        run(tmp_path, tmp_path / "o", calibration="self", sparsity=0.5)
    assert not (tmp_path / "o").exists()


def test_a_class_whose_own_code_fails_with_kept_keys_does_not_write(unchecked, monkeypatch, tmp_path):
    layer = modeling_stablelm.StableLmDecoderLayer
    run_layer = layer.forward

    def refuses(self, hidden_states, *others, past_key_values=None, **arguments):
        if past_key_values is not None:
            raise TypeError("no such cache")
        return run_layer(self, hidden_states, *others, **arguments)

    make_architecture(tmp_path / "model", "stablelm", DENSE["stablelm"])
    monkeypatch.setattr(layer, "forward", refuses)
    reason = "'self' is not possible: a small model of its class, run token by token, fails: no such cache; give a text"
    with pytest.raises(InputError, match=f"^calibration: {reason}$"):
        run(tmp_path, tmp_path / "o", calibration="self", sparsity=0.5)
    assert not (tmp_path / "o").exists()


def test_a_model_that_looks_at_later_tokens_is_refused(unchecked):
    values = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    with pytest.raises(InputError, match="predicts tokens from those behind them: it is no causal language model"):
        check_class(AutoConfig.for_model("electra", num_attention_heads=4, **values))


def test_a_check_is_small_and_has_a_layer_of_each_kind():
    large = {"vocab_size": 100_000, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text", **large, num_key_value_heads=8, head_dim=128, num_hidden_layers=60, layer_types=kinds * 10
    )
    small = small_config(config)
    assert small.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (16, 2, 128)
    assert (small.vocab_size, small.hidden_size, small.intermediate_size) == (256, 2048, 4096)


def test_a_check_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert difference_layer_by_layer(AutoConfig.for_model("olmo", **DENSE["olmo"])) == 0
    assert torch.equal(torch.get_rng_state(), before)
