"""Trainings under DeepSpeed on a GPU: losses and weights of plain PyTorch on the CPU, and the same bits twice.

DeepSpeed serves one kind of device in a process: these need DS_ACCELERATOR=cuda, which `make gpu` sets.
"""

import json
import math
import os

import numpy as np
import pytest
import torch

from tests.recovery.test_images import plain_loss
from tests.recovery.test_training import UPDATES, WAYS
from tests.recovery.trainings import checked, furthest, losses, make_material, plain_training, same_zeros, train
from tests.support.running import search_run
from tests.support.seeing import make_conversations, make_seeing
from tests.support.tiny import GROUPED, differing, make_model, make_tokens
from tests.support.words import WORDS, words_tokenizer

GPU = {"device": "cuda", "precision": "fp32"}

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def card():
    pytest.importorskip("deepspeed")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if os.environ["DS_ACCELERATOR"] != "cuda":
        pytest.skip("DS_ACCELERATOR is not cuda")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_material(tmp_path_factory.mktemp("recovery"))


@pytest.mark.parametrize(
    ("zero", "way", "fields"),
    [
        (0, "full", {}),
        (0, "low-rank", {"keep_sparsity": True}),
        (2, "low-rank", {"keep_sparsity": True, "recompute": True}),
        (3, "full", {"keep_sparsity": True}),
        (3, "low-rank", {"teacher": "dense", "temperature": 1.5}),
        (1, "full", {"teacher": "dense", "teacher_weight": 0.3}),
    ],
    ids=str,
)
def test_a_training_is_plain_pytorch_on_the_cpu(place, zero, way, fields, tmp_path):
    fields = {**WAYS[way], **fields, "steps": 6}
    if "teacher" in fields:
        fields["teacher"] = str(place / fields["teacher"])
    expected, weights = plain_training(checked(place, "o", **fields))
    for out in ("first", "second"):
        result = train(place, tmp_path / out, zero=zero, **GPU, **fields)
        assert losses(result) == pytest.approx(expected, abs=1e-4)
    assert furthest(tmp_path / "first", weights) < 1e-4
    assert differing(tmp_path / "first", tmp_path / "second") == []
    if fields.get("keep_sparsity"):
        assert same_zeros(place / "sparse", tmp_path / "first")


@pytest.mark.parametrize(("zero", "way"), [(1, "full"), (2, "low-rank"), (3, "low-rank")])
def test_a_training_in_bf16_learns_as_plain_pytorch_does(place, zero, way, tmp_path):
    fields = {**WAYS[way], "keep_sparsity": True}
    expected, _ = plain_training(checked(place, "o", **fields))
    result = train(place, tmp_path / "o", zero=zero, device="cuda", precision="bf16", **fields)
    assert losses(result) == pytest.approx(expected, abs=0.03)
    learned, plain = (values[0] - values[-1] for values in (losses(result), expected))
    assert learned > 0.5 * plain > 0
    assert same_zeros(place / "sparse", tmp_path / "o")


def test_a_training_whose_states_are_offloaded_is_the_same(place, tmp_path):
    fields = {**UPDATES, "steps": 6}
    expected, weights = plain_training(checked(place, "o", **fields))
    result = train(place, tmp_path / "o", zero=2, offload=True, **GPU, **fields)
    assert losses(result) == pytest.approx(expected, abs=1e-4)
    assert furthest(tmp_path / "o", weights) < 1e-4


def test_a_llava_learns_answers_about_images(place, tmp_path):
    make_seeing(tmp_path / "model")
    data = make_conversations(tmp_path)
    fields = {"model": str(tmp_path / "model"), "data": data, "images": str(tmp_path / "images"), "length": 64}
    training = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant", "steps": 3, "batch": 12}
    result = train(place, tmp_path / "o", micro_batch=3, **{**fields, **training, **GPU, "lora_rank": 8})
    before, after = (plain_loss(model, fields, range(12)) for model in (tmp_path / "model", tmp_path / "o"))
    assert losses(result)[0] == pytest.approx(before, rel=1e-4)
    assert math.exp(after) < 0.7 * math.exp(before)


def test_candidates_that_are_tuned_are_the_same_twice(tmp_path):
    make_model(tmp_path / "model", "llama-3.1", configs=GROUPED)
    words_tokenizer().save_pretrained(tmp_path / "model")
    make_tokens(tmp_path / "tokens.npy")
    draw = np.random.default_rng(1)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS[3:], 8))}) for _ in range(24)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines))
    tuned = {"tune_candidates": 3, "tune_length": 12, "tune_batch": 4, "tune_learning_rate": 1e-2, "seed": 5}
    tuned |= {"tune_data": str(tmp_path / "documents.jsonl"), "remove": 0.3, "device": "cuda", "dtype": "float32"}
    steps = []
    for out in ("first", "second"):
        steps.append(search_run(tmp_path, out, **tuned).structure.path)
        assert all(score < step.untuned[letter] for step in steps[-1] for letter, score in step.scores.items())
    assert [step.scores for step in steps[0]] == [step.scores for step in steps[1]]
    assert differing(tmp_path / "first", tmp_path / "second") == []
