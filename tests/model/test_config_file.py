"""Configs as they come: what is wrong with them is one line, found before anything is built from them."""

import json
import math

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.cli import main
from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.checks import check_seqlen
from shardprune.model.config_file import config_fields, config_text, parse_config, raw_config, with_changes
from shardprune.model.skeleton import Skeleton
from shardprune.storage.folder import Folder
from tests.support.architectures import MIXED, make_architecture
from tests.support.infinities import FORMS, INFINITE, with_infinities
from tests.support.tiny import CONFIGS, make_model

LLAMA = {"model_type": "llama", **CONFIGS["llama"][1]}

BAD = {
    "no config": (b"[]", r"^model: x/config.json holds \[\]; "),
    "no JSON": (b"{", r"^model: x/config.json is not JSON: "),
    "no type": ({}, r"^model: x/config.json lacks model_type$"),
    "a type of another kind": ({"model_type": 5}, r"^model: x/config.json holds 5 as model_type; use a valid string$"),
    "unsupported": (
        {"model_type": "gpt7"},
        r"^model: model_type 'gpt7' is not known to transformers [\d.]+; another version may",
    ),
    "encoder and decoder": (
        {"model_type": "t5"},
        r"^model: model_type 't5' has no causal language model in transformers$",
    ),
    "vision and language": (
        {"model_type": "paligemma"},
        r"^model: model_type 'paligemma' has other parts beside its language model .*; of such models only gemma3, ",
    ),
    "several language models": ({"model_type": "musicgen"}, r"^model: "),
    "a billion layers": (
        {**LLAMA, "num_hidden_layers": 10**9},
        r"^model: x/config.json holds 1000000000 as num_hidden_layers; use less than or equal to 2000$",
    ),
    "a billion layers with types": (
        {**LLAMA, "model_type": "qwen2", "num_hidden_layers": 10**9},
        r"holds 1000000000 as num_hidden_layers",
    ),
    "too many experts": (
        {**LLAMA, "num_experts": [4, 4 * 10**6]},
        r"^model: x/config.json holds 4000000 as num_experts; use less than or equal to 16384$",
    ),
    "no layers": ({**LLAMA, "num_hidden_layers": 0}, r"holds 0 as num_hidden_layers; use greater than or equal to 1$"),
    "a billion in a tower": (
        {"model_type": "llava", "text_config": {**LLAMA, "num_hidden_layers": 10**9}},
        r"holds 1000000000 as text_config\.num_hidden_layers",
    ),
    "unknown rotary embeddings": (
        {**LLAMA, "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        r"^model: x/config.json cannot be read as a config: rope_type is 'spiral'; use one of default, linear, ",
    ),
    "a huge head": ({**LLAMA, "head_dim": 2**40}, r"holds 1099511627776 as head_dim"),
    "a huge rotary part": ({**LLAMA, "partial_rotary_factor": 1e9}, r"holds 1000000000\.0 as partial_rotary_factor"),
    "a billion labels": ({**LLAMA, "num_labels": 10**9}, r"holds 1000000000 as num_labels"),
    "text for a number": ({**LLAMA, "hidden_size": "x"}, r"holds 'x' as hidden_size; use a valid integer$"),
    "text for another number": (
        {**LLAMA, "intermediate_size": "x"},
        r"^model: x/config.json cannot be read as a config: .*'intermediate_size'.* int",
    ),
    "not finite": (b'{"model_type": "llama", "rms_norm_eps": NaN}', r"^model: x/config.json is not JSON: "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_one_line_with_its_reason(case, capsys):
    content, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        parse_config(content if isinstance(content, bytes) else json.dumps(content).encode(), "x/config.json")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""  # nothing of transformers' own before the line


def test_warnings_of_transformers_are_kept_where_it_reads_the_config(caplog, monkeypatch):
    logger = transformers.logging.get_logger("transformers.tests")
    monkeypatch.setattr(
        transformers.AutoConfig,
        "from_pretrained",
        lambda *_, **__: logger.warning("kept") or transformers.LlamaConfig(),
    )
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    parse_config(json.dumps(LLAMA).encode(), "x")
    assert "kept" in caplog.messages


def test_plan_and_prune_refuse_a_billion_layers(tmp_path, capsys):
    make_model(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 10**9}))
    for arguments in (
        ["plan", str(file)],
        ["prune", str(file.parent), "--out", str(tmp_path / "out"), "--sparsity", "0.5"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "num_hidden_layers; use less than or equal to 2000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dynamic_rotary_embeddings_take_more_positions_than_the_config_has():
    values = {**CONFIGS["llama"][1], "max_position_embeddings": 16}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    check_seqlen(24, Skeleton(transformers.LlamaConfig(**values, rope_parameters=rope), "cpu"))
    with pytest.raises(InputError, match="seqlen: 24 is more than the model's 16 positions"):
        check_seqlen(24, Skeleton(transformers.LlamaConfig(**values), "cpu"))


def test_an_error_names_the_field_that_gave_the_checkpoint(tmp_path):
    transformers.T5Config(num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="^sparse: model_type 't5' has no causal language model"):
        Checkpoint(str(tmp_path), "sparse")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", INFINITE)
def test_infinite_numbers_are_read_as_transformers_reads_them(model_type, form):
    text = with_infinities(AutoConfig.for_model(model_type, **MIXED[model_type]), form)
    assert [*parse_config(text.encode(), "x").time_step_limit] == [0.0, math.inf]


@pytest.mark.parametrize("form", FORMS)
def test_infinite_numbers_of_a_config_that_changes_stay(form, tmp_path):
    make_architecture(tmp_path, "mamba2", MIXED["mamba2"])
    file = tmp_path / "config.json"
    file.write_text(with_infinities(AutoConfig.from_pretrained(tmp_path), form))
    fields = raw_config(Folder(str(tmp_path), "model"))
    assert fields == config_fields(file.read_bytes())
    file.write_text(config_text(with_changes(fields, {"chunk_size": 8}, tower=False, untied=False)))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert [*model.config.time_step_limit] == [0.0, math.inf]
    assert model.config.chunk_size == 8
    assert bool(model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all())


@pytest.mark.parametrize("word", ["hidden_size", "num_hidden_layers"])
def test_an_infinite_size_is_refused(word):
    with pytest.raises(InputError, match=rf"^model: x/config.json holds inf as {word}; use a valid integer$"):
        parse_config(json.dumps({**LLAMA, word: math.inf}).encode(), "x/config.json")
