"""Attention of packed rows by examples: every token as if its example were alone, in every family that has it."""

from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.model.empty_model import attention_of
from shardprune.recovery import packed_attention
from shardprune.recovery.packed_attention import BOUNDS, attend_by_example, bounds_of
from shardprune.recovery.rows import Rows, pack
from tests.recovery.test_rows import random_examples
from tests.recovery.trainings import losses, train
from tests.support.tiny import CONFIGS, make_model

CPU = torch.device("cpu")
SIZES = [13, 9, 2, 11, 5, 12, 20, 3, 1, 17]  # beyond the sliding windows of 8
BY_EXAMPLE = [name for name, (config, _) in CONFIGS.items() if config not in ("Gemma2Config", "OPTConfig")]


def load(folder):
    attention = attention_of(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)


def states(model, batch):
    """The last hidden states of all tokens of rows, [batch, longest, width]."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", BY_EXAMPLE)
def test_every_token_is_as_in_its_example_alone(name, batch, tmp_path):
    model = load(make_model(tmp_path, name))
    examples = random_examples(SIZES)
    alone, parts = Rows.of([[one] for one in examples]), pack(SIZES, 30)
    packed = Rows.of([[examples[index] for index in row] for row in parts])
    assert packed.packed
    assert not alone.packed
    weights = [torch.randn(size, model.config.hidden_size) for size in SIZES]
    expected = [states(model, alone.collate([index]))[0] for index in range(len(alone))]
    sum((one * weight).sum() for one, weight in zip(expected, weights, strict=True)).backward()
    learned = [parameter for parameter in model.parameters() if parameter.grad is not None]  # not the head
    gradients = [parameter.grad.clone() for parameter in learned]
    model.zero_grad()
    assert attend_by_example(model, CPU)
    total = torch.zeros(())
    for start in range(0, len(packed), batch):
        rows = range(start, min(start + batch, len(packed)))
        inputs = packed.collate(rows)
        found = states(model, {**inputs, BOUNDS: bounds_of(inputs["position_ids"])})
        for place, row in enumerate(rows):
            offset = 0
            for index in parts[row]:
                one = found[place, offset : offset + SIZES[index]]
                torch.testing.assert_close(one, expected[index], rtol=1e-4, atol=1e-5)
                total = total + (one * weights[index]).sum()
                offset += SIZES[index]
    total.backward()
    for parameter, gradient in zip(learned, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


def test_examples_and_padding_are_bounded():
    rows = Rows.of([[one] for one in random_examples([4])] + [random_examples([2, 1])])
    batch = rows.collate([1, 0])
    assert bounds_of(batch["position_ids"]).tolist() == [0, 2, 4, 8]  # the padding is the last example's


def test_models_that_cap_scores_keep_the_mask(tmp_path):
    model = load(make_model(tmp_path, "gemma2"))
    assert not attend_by_example(model, CPU)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ({}, True),
        ({"dtype": torch.float32}, False),
        ({"capability": (7, 5)}, False),
        ({"head_dim": 272}, False),
        ({"head_dim": 12}, False),
        ({"attention_dropout": 0.1}, False),
    ],
    ids=str,
)
def test_the_kernel_is_taken_where_it_can_be(fields, answer, tmp_path):
    model = load(make_model(tmp_path, "llama-3.1")).to(fields.get("dtype", torch.bfloat16))
    model.config.head_dim = fields.get("head_dim", 64)
    model.config.attention_dropout = fields.get("attention_dropout", 0.0)
    with patch("torch.cuda.get_device_capability", return_value=fields.get("capability", (8, 0))):
        assert attend_by_example(model, torch.device("cuda")) == answer


@pytest.mark.parametrize("teacher", [False, True])
def test_packed_rows_of_a_training_attend_by_examples(folder, teacher, tmp_path):
    fields = {"teacher": str(folder / "dense")} if teacher else {}
    with patch.object(packed_attention, "attend", wraps=packed_attention.attend) as attended:
        train(folder, tmp_path / "alone", steps=1, **fields)
        assert not attended.called
        packed = train(folder, tmp_path / "packed", steps=2, packing=True, **fields)
    layers = AutoConfig.from_pretrained(folder / "sparse").num_hidden_layers
    assert attended.call_count % layers == 0
    assert attended.call_count > layers * teacher
    again = train(folder, tmp_path / "again", steps=2, packing=True, recompute=True, **fields)
    assert losses(again) == losses(packed)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, 100])
def test_the_kernel_gives_what_each_example_alone_does(window, groups, width):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 1, 130, 300, 512, 700, 1024], dtype=torch.int32)
    shapes = [(2, heads, 512, width) for heads in (8, 8 // groups, 8 // groups)]
    plain = [torch.randn(shape, generator=generator).bfloat16().float().requires_grad_() for shape in shapes]
    ours = [one.detach().cuda().bfloat16().requires_grad_() for one in plain]
    weights = torch.randn(2, 512, 8, width, generator=generator)
    settings = {"scaling": width**-0.5, "sliding_window": window}
    results = []
    for tensors in (plain, ours):
        told = {**settings, BOUNDS: bounds.to(tensors[0].device)}
        output, _ = packed_attention.attend(torch.nn.Identity(), *tensors, None, **told)
        (output * weights.to(output.device)).sum().backward()
        results.append([output, *(one.grad for one in tensors)])
    for expected, found in zip(*results, strict=True):
        assert float((found.cpu().float() - expected).norm() / expected.norm()) < 0.01
