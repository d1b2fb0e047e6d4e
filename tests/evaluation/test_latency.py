"""Tokens per second and continuations: counted against transformers, in turn with the model that a line began with."""

import json
import shutil
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shardprune.errors import InputError
from shardprune.evaluation import latency
from shardprune.evaluation.latency import THIS, original_of
from shardprune.report.result import Result
from shardprune.report.verdict import verdict
from tests.evaluation.material import evaluated, make_readable
from tests.support.architectures import MIXED
from tests.support.running import run
from tests.support.tiny import make_model, make_tokens

SHORT = {"latency": True, "latency_prompt": 6, "latency_tokens": 3, "latency_rounds": 3, "latency_batches": (1, 4)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    make_readable(folder / "model")
    make_tokens(folder / "tokens.npy")
    run(folder, "narrow", structured=0.3)
    run(folder, "again", model="narrow", sparsity=0.5)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    """The result, and how often each model was called with which batch and how many tokens."""
    calls = []
    answer = latency._answer

    def counted(model, tokens, count):
        calls.append((model.config.intermediate_size, tuple(tokens.shape), count))
        return answer(model, tokens, count)

    with patch.object(latency, "_answer", counted):
        result = evaluated(folder / "again", report=True, **SHORT)
    return result.evaluation.latency, calls


def test_models_take_turns_and_the_first_round_does_not_count(folder, measured):
    found, calls = measured
    narrow = json.loads((folder / "narrow" / "config.json").read_text())["intermediate_size"]
    turns = [narrow, 48] * (SHORT["latency_rounds"] + 1)
    assert [call for call in calls if call[1][0] == 1] == [(size, (1, 6), 3) for size in turns]
    assert [call for call in calls if call[1][0] == 4] == [(size, (4, 6), 3) for size in turns]
    assert found.rounds == 3
    assert {(speed.model, speed.batch) for speed in found.speeds} == {
        (name, batch) for name in ("pruned", "dense") for batch in (1, 4)
    }
    for speed in found.speeds:
        for rate in (speed.prefill, speed.decode):
            assert 0 < rate.least <= rate.median <= rate.most


@pytest.mark.parametrize("gone", ["model", "narrow"])
def test_a_model_is_measured_alone_where_the_one_its_line_began_with_is_gone(folder, gone, tmp_path, caplog):
    """What the line passed through is not what it began with, and is not measured as if it were."""
    out = shutil.copytree(folder / "again", tmp_path / "again")
    (folder / gone).rename(folder / "elsewhere")
    try:
        assert original_of(str(out)) is None
        found = evaluated(out, **SHORT).evaluation.latency
    finally:
        (folder / "elsewhere").rename(folder / gone)
    assert found.beside is None
    assert found.weights.keys() == {THIS}
    assert f"the speed of {out} is compared with no other: " in caplog.text


def test_rates_are_tokens_by_seconds():
    rate = latency._rate(100, [1.0, 4.0, 2.0])
    assert (rate.median, rate.least, rate.most) == (50.0, 25.0, 100.0)


def test_the_model_beside_it_is_the_one_that_the_line_began_with(folder, measured):
    found, _ = measured
    assert found.beside == str(folder / "model")
    assert original_of(str(folder / "again")) == str(folder / "model")
    assert original_of(str(folder / "model")) is None
    sizes = {name: AutoModelForCausalLM.from_pretrained(folder / place).num_parameters() for name, place in
             (("pruned", "again"), ("dense", "model"))}  # fmt: skip
    assert {name: weights.parameters for name, weights in found.weights.items()} == sizes
    assert {name: weights.bytes for name, weights in found.weights.items()} == {
        name: 4 * count for name, count in sizes.items()
    }


def test_another_model_beside_it_is_not_the_dense_one(folder, tmp_path):
    run(folder, tmp_path / "o", sparsity=0.5)
    short = {**SHORT, "latency_rounds": 1, "latency_batches": (1,)}
    for beside, name in (("narrow", "beside"), ("model", "dense")):
        result = evaluated(tmp_path / "o", latency_beside=str(folder / beside), **short)
        found = result.evaluation.latency
        assert {speed.model for speed in found.speeds} == found.weights.keys() == {"pruned", name}
        assert all(text.before is not None for text in found.continuations)
        told = verdict(Result(**json.loads((tmp_path / "o" / "result.json").read_text())))
        assert ("decoding" in told) == (name == "dense")


def test_continuations_are_those_of_transformers(folder, measured):
    found, _ = measured
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert [text.prompt for text in found.continuations] == list(latency.PROMPTS)
    for place, written in (("model", "before"), ("again", "after")):
        model = AutoModelForCausalLM.from_pretrained(folder / place, attn_implementation="eager")
        for text in found.continuations:
            tokens = tokenizer(text.prompt, return_tensors="pt").input_ids
            for _ in range(latency.WRITTEN):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
            assert getattr(text, written) == tokenizer.decode(tokens[0, -latency.WRITTEN :])


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bamba", "lfm2", "mamba2"])
def test_models_that_keep_states_go_on_from_these(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MIXED[model_type])).eval()
    tokens = torch.randint(2, 60, (1, 5))
    written = tokens
    for _ in range(latency.WRITTEN):
        written = torch.cat([written, model(written, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert latency._written(model, tokens) == written[0, 5:].tolist()
    assert all(seconds > 0 for seconds in latency._answer(model, tokens, 2))


def test_it_stands_in_the_result_the_card_and_the_report(folder, measured):
    found, _ = measured
    held = json.loads((folder / "again" / "result.json").read_text())["evaluation"]["latency"]
    assert held["speeds"][0]["decode"]["median"] == pytest.approx(found.speeds[0].decode.median)
    page = (folder / "again" / "report.html").read_text()
    for text in ("decode, tokens/s", "pruned, batch 4 on", "dense, greedily", latency.PROMPTS[0]):
        assert text in page
    assert "| prefill, tokens/s |" in (folder / "again" / "README.md").read_text()


def test_a_model_of_no_line_is_measured_alone(folder, tmp_path):
    make_model(tmp_path / "model", "llama-3.1")
    found = evaluated(tmp_path / "model", **SHORT).evaluation.latency
    assert {speed.model for speed in found.speeds} == {THIS}
    assert found.beside is None
    assert found.continuations == []
    beside = evaluated(tmp_path / "model", **SHORT, latency_beside=str(folder / "narrow")).evaluation.latency
    assert len(beside.speeds) == 4


def test_what_cannot_work_is_said_first(folder, tmp_path):
    def refused(reason, **fields):
        with pytest.raises(InputError, match=reason):
            evaluated(folder / "again", **{**SHORT, **fields})

    refused("latency_prompt: 65 tokens with those of the answer; the model has 64", latency_prompt=62)
    refused("latency_beside: .* is no directory", latency_beside=str(tmp_path / "nowhere"))
    refused(r"latency_batches: \(1, 4\) has no effect without latency", latency=False, perplexity=("stdlib",))
    refused("latency_batches: 0 is not allowed", latency_batches=(0,))
