"""Runs of kinds beyond a plain SparseGPT on a GPU: twice, and beside the CPU's."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from shardprune import EvaluateRecipe, ExpertsRecipe, evaluate, experts
from shardprune.report.progress import Reporter
from shardprune.shard.forward_worker import ForwardWorker
from tests.commands.test_architectures import perplexity
from tests.support.architectures import CARRYING, MIXED, MIXTURES, make_architecture
from tests.support.fp8 import make_fp8
from tests.support.running import run, search_run
from tests.support.seeing import make_conversations, make_seeing
from tests.support.tiny import GROUPED, differing, make_model, make_tokens
from tests.support.towers import make_tower

NEAR = 1e-2  # of the perplexity: at near-ties sums in another order choose other zeros
CHOSEN = CARRYING | {
    name: table[name]
    for table, names in (
        (MIXTURES, ("qwen3_moe", "deepseek_v3", "kimi_linear", "llama4_text", "longcat_flash", "minimax")),
        (MIXED, ("qwen3_5_text", "jamba", "falcon_h1", "olmo_hybrid")),
    )
    for name in names
}
CHOOSING = ("glm_moe_dsa", "deepseek_v4")
TOWERS = ("qwen3_vl", "mllama")
TRAINED = {"targets": "stream", "reconstruct": 6}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def card():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def make(folder, model_type):
    try:
        if model_type in TOWERS:
            make_tower(folder / "model", model_type)
        elif model_type in CHOSEN:
            make_architecture(folder / "model", model_type, CHOSEN[model_type])
        else:
            make_model(folder / "model", model_type, configs=GROUPED)
    except ValueError as error:
        if "does not exist" not in str(error) and "Unrecognized" not in str(error):
            raise
        pytest.skip(f"transformers has no {model_type}")
    return str(make_tokens(folder / "tokens.npy"))


def agrees(folder, run, text, **fields):
    """Run on the GPU twice and on the CPU: the same bits twice, and perplexities near the CPU's.

    Models that choose tokens to attend to choose others there where scores are alike: transformers' own perplexities
    differ by 3 % between the two. Those are held against transformers' on the GPU.
    """
    measured = {}
    for out, device in (("first", "cuda"), ("second", "cuda"), ("here", "cpu")):
        result = run(folder, out, device=device, dtype="float32", eval=(text,), **fields)
        (measured[out],) = result.perplexity.values()
    assert differing(folder / "first", folder / "second") == []
    assert measured["first"].after != measured["first"].before
    if AutoConfig.from_pretrained(folder / "model").model_type in CHOOSING:
        tokens = torch.from_numpy(np.load(text))
        assert measured["first"].before == pytest.approx(perplexity(folder / "model", tokens, "cuda"), rel=1e-4)
        assert measured["first"].after == pytest.approx(perplexity(folder / "first", tokens, "cuda"), rel=1e-4)
    else:
        assert measured["first"].before == pytest.approx(measured["here"].before, rel=1e-4)
        assert measured["first"].after == pytest.approx(measured["here"].after, rel=NEAR)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        *((name, {}) for name in (*CHOSEN, *TOWERS)),
        ("qwen3_moe", {"allocation": "fisher"}),
        ("qwen3_moe", {"expert_tokens": "all"}),
        ("qwen3_moe", {"weights": "streamed", "expert_chunks": 2}),
        ("llama-3.1", TRAINED),
        ("gemma4_text", {"targets": "own", "reconstruct": 6}),
        ("llama-3.1", {"quality": "best", "targets": "auto"}),
        ("llama-3.1", {"damping": "auto"}),
    ],
)
def test_weights_that_are_removed_are_those_on_the_cpu(model_type, fields, tmp_path):
    agrees(tmp_path, run, make(tmp_path, model_type), sparsity=0.5, **fields)


@pytest.mark.parametrize("model_type", ["llama-3.1", "qwen3_5_text", "falcon_h1"])
def test_a_model_writes_its_own_text_as_on_the_cpu(model_type, tmp_path):
    make(tmp_path, model_type)
    written = {}
    for out, device in (("first", "cuda"), ("second", "cuda"), ("here", "cpu")):
        run(tmp_path, out, sparsity=0.5, calibration="self", device=device, dtype="float32")
        written[out] = np.load(tmp_path / out / "self.npy")
    assert differing(tmp_path / "first", tmp_path / "second") == []
    assert (written["first"] == written["second"]).all()
    # A draw next to a token's bound gives another one, and all that follow in its sequence.
    assert (written["first"] == written["here"]).mean() > 0.9


def test_answers_about_images_are_those_on_the_cpu(tmp_path):
    make_seeing(tmp_path / "model")
    answers = make_conversations(tmp_path)
    found = {}
    for device in ("cuda", "cpu"):
        fields = {"model": str(tmp_path / "model"), "answers": answers, "images": str(tmp_path / "images")}
        fields |= {"backend": "local", "threads": 1, "device": device, "dtype": "float32", "report": False}
        (measured,) = evaluate(EvaluateRecipe.checked(fields), Reporter(quiet=True)).evaluation.answers.values()
        found[device] = measured.value
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-4)


@pytest.mark.parametrize("path", ["L", "G"])
def test_a_search_and_its_training_are_those_on_the_cpu(path, tmp_path):
    agrees(tmp_path, search_run, make(tmp_path, "llama-3.1"), path=path, reconstruct=6)


def test_a_training_that_leaves_the_device_between_its_steps_has_the_same_bits(tmp_path, monkeypatch):
    make(tmp_path, "llama-3.1")
    for out, on_host in (("device", False), ("host", True)):
        monkeypatch.setattr(ForwardWorker, "trains_on_host", lambda _, on_host=on_host: on_host)
        run(tmp_path, out, sparsity=0.5, device="cuda", dtype="float32", **TRAINED)
    assert differing(tmp_path / "device", tmp_path / "host") == []


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama-3.1", {"pattern": "2:4", "weights": "streamed"}),
        ("deepseek_v3", {"method": "wanda", "sparsity": 0.5}),
        ("qwen3_moe", {"sparsity": 0.5, "expert_chunks": 2}),
    ],
)
def test_an_fp8_model_is_pruned_as_the_products_of_its_weights_and_scales(model_type, fields, tmp_path):
    make(tmp_path, model_type)
    for out, model in zip(("fp8", "products"), make_fp8(tmp_path / "model", block=(12, 20)), strict=True):
        run(tmp_path, out, model, device="cuda", **fields)
    assert differing(tmp_path / "fp8", tmp_path / "products") == []


@pytest.mark.parametrize("fields", [{}, {"merge": True}, {"router_kd": 4}, {"reconstruct": 4}], ids=str)
def test_the_experts_that_go_are_those_on_the_cpu(fields, tmp_path):
    make(tmp_path, "qwen3_moe")
    values = {"model": str(tmp_path / "model"), "calibration": str(tmp_path / "tokens.npy"), "keep": 3}
    values |= {"samples": 12, "seqlen": 24, "backend": "local", "threads": 1, "dtype": "float32", "report": False}
    for out, device in (("first", "cuda"), ("second", "cuda"), ("here", "cpu")):
        recipe = ExpertsRecipe.checked({**values, "out": str(tmp_path / out), "device": device, **fields})
        experts(recipe, Reporter(quiet=True))
    assert differing(tmp_path / "first", tmp_path / "second") == []
    if not fields:
        assert differing(tmp_path / "first", tmp_path / "here") == []
