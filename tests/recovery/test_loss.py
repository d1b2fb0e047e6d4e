"""The losses and their gradients against Hugging Face's own and against the formulas, and the memory that they take."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import shardprune.recovery.loss
from shardprune.errors import InputError
from shardprune.model.head_logits import HeadLogits, head_logits
from shardprune.recovery.distillation import WholeDistillation
from shardprune.recovery.loss import LossHead, loss_and_gradient
from shardprune.recovery.predictions import PredictionBatch, Reading
from shardprune.recovery.rows import Example, Rows
from shardprune.recovery.student import Student, Teacher
from tests.support.architectures import CARRYING, DENSE, MIXED, MIXTURES, make_architecture
from tests.support.tiny import CONFIGS, make_model

TOKENS, WIDTH, VOCABULARY = 11, 5, 9


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Three chunks of predictions, the last one not full."""
    monkeypatch.setattr(shardprune.recovery.loss, "CHUNK", 4)


def inputs(dtype=torch.float32, bias=True):
    """The head's input, the head, the tokens that follow, and a teacher's logits."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(0, VOCABULARY, (TOKENS,)), 3 * torch.randn(TOKENS, VOCABULARY, dtype=dtype)


def plain_loss(hidden, head, targets, cap, distillation):
    """The loss of every prediction in turn."""

    def cut(logits, cap):
        return logits if cap is None else cap * torch.tanh(logits / cap)

    total = torch.zeros((), dtype=torch.float64)
    for place, target in enumerate(targets.tolist()):
        given = cut(hidden[place].double() @ head.weight.double().T + head.bias.double(), cap)
        hard = -torch.log_softmax(given, 0)[target]
        if distillation is None:
            total = total + hard
            continue
        t = distillation.temperature
        wanted = torch.softmax(cut(distillation.outputs[place].double(), distillation.made.cap) / t, 0)
        soft = t**2 * sum(p * (p.log() - q) for p, q in zip(wanted, torch.log_softmax(given / t, 0), strict=True))
        total = total + distillation.weight * soft + (1 - distillation.weight) * hard
    return total


@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("distilled", [None, (None, 1.7, 0.3), (2.0, 0.8, 1.0)], ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_the_loss_and_its_gradients_are_the_formulas(cap, distilled, trained):
    hidden, head, targets, logits = inputs()
    distillation = WholeDistillation(logits, HeadLogits(cap=distilled[0]), *distilled[1:]) if distilled else None
    expected = plain_loss(hidden, head, targets, cap, distillation)
    wanted = torch.autograd.grad(expected * 0.1, [hidden, head.weight, head.bias])
    head.requires_grad_(trained)
    loss_head = LossHead(head, HeadLogits(cap=cap))
    assert dict(loss_head.named_parameters()).keys() == dict(head.named_parameters()).keys()
    loss = loss_head(hidden, targets, distillation)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected)
    (loss * 0.1).backward()
    torch.testing.assert_close(hidden.grad, wanted[0])
    for parameter, gradient in zip((head.weight, head.bias), wanted[1:], strict=True):
        if trained:
            torch.testing.assert_close(parameter.grad, gradient)
        else:
            assert parameter.grad is None
    with torch.no_grad():
        assert torch.equal(loss_head(hidden, targets, distillation), loss)


def test_the_gradient_of_a_loss_is_numerically_right():
    _, _, targets, logits = inputs()
    given = torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)
    distillation = WholeDistillation(logits, HeadLogits(cap=2.0), 1.7, 0.3)
    _, gradient = loss_and_gradient(given, targets, HeadLogits(0.7, 1.5), distillation)
    for place, column in ((0, 0), (3, int(targets[3])), (10, 8)):
        step = torch.zeros_like(given)
        step[place, column] = 1e-2
        ends = [
            loss_and_gradient(given + sign * step, targets, HeadLogits(0.7, 1.5), distillation)[0] for sign in (1, -1)
        ]
        assert float(ends[0] - ends[1]) / 2e-2 == pytest.approx(float(gradient[place, column]), abs=2e-3)


def test_in_bf16_losses_are_computed_and_sums_over_chunks_kept_in_float32():
    hidden, head, targets, logits = inputs(torch.bfloat16)
    distillation = WholeDistillation(logits, HeadLogits(), 2.0, 0.5)
    loss = LossHead(head, HeadLogits())(hidden, targets, distillation)
    loss.backward()
    products = nn.functional.linear(hidden, head.weight, head.bias).detach()  # rounded, as the model makes them
    expected, gradient = loss_and_gradient(products, targets, HeadLogits(), distillation)
    torch.testing.assert_close(loss, expected)
    rounded = gradient.bfloat16()
    exact = rounded.double().T @ hidden.detach().double()
    torch.testing.assert_close(head.weight.grad, exact.bfloat16())
    torch.testing.assert_close(hidden.grad, (rounded.double() @ head.weight.detach().double()).bfloat16())


def test_the_divergence_of_a_teacher_from_itself_is_nothing():
    *_, logits = inputs()
    loss, gradient = WholeDistillation(logits, HeadLogits(), 1.7, 0.5).divergence(logits)
    assert abs(float(loss)) < 1e-5
    assert gradient.abs().max() < 1e-6


def test_nothing_that_is_predicted_is_a_loss_of_zero():
    hidden, head, targets, _ = inputs()
    loss = LossHead(head, HeadLogits())(hidden[:0], targets[:0])
    loss.backward()
    assert float(loss.detach()) == 0
    assert not head.weight.grad.any()
    assert not hidden.grad.any()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("distilled", [True, False])
def test_no_tensor_has_the_logits_of_all_predictions(monkeypatch, distilled):
    monkeypatch.setattr(shardprune.recovery.loss, "CHUNK", 32)
    head = nn.Linear(2, 500)
    hidden, targets = torch.randn(200, 2, requires_grad=True), torch.randint(0, 500, (200,))
    distillation = WholeDistillation(torch.randn(200, 500), HeadLogits(cap=3.0), 2.0, 0.5) if distilled else None
    with Largest() as largest:
        LossHead(head, HeadLogits(cap=2.0))(hidden, targets, distillation).backward()
    assert largest.elements == 32 * 500


# Architectures that scale or cap the outputs of their heads, with the fields that say how.
SHAPED: dict[str, dict[str, float]] = {
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 6.0},
    "granitemoehybrid": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.02},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "gemma3n_text": {"final_logit_softcapping": 0.5},
}
KNOWN = {**DENSE, **MIXED, **MIXTURES, **CARRYING}


@pytest.mark.parametrize("family", [*CONFIGS, *SHAPED])
def test_a_family_loses_the_same_as_in_transformers(family, tmp_path):
    """Its head with whatever it does to logits, on rows of different lengths of which only a part counts."""
    if family in SHAPED:
        make_architecture(tmp_path, family, {**KNOWN[family], **SHAPED[family]})
    else:
        make_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    examples = [
        Example(
            torch.randint(0, 64, (length,), generator=generator).int(), torch.rand(length, generator=generator) < 0.7
        )
        for length in (7, 12, 3)
    ]
    rows = Rows.of([[example] for example in examples])
    total, count, logits = 0.0, 0, []
    for index in range(len(rows)):
        row = rows.row(index)
        labels = torch.where(row.learned, row.tokens.long(), -100)[None]
        with torch.no_grad():
            output = model(row.tokens.long()[None], labels=labels)
        predicted = row.learned[1:]
        total += float(output.loss) * int(predicted.sum()) if predicted.any() else 0.0
        count += int(predicted.sum())
        logits.append(output.logits[0, :-1][predicted])
    batch = PredictionBatch.of(rows, range(3), Reading(mask=False))
    assert len(batch.targets) == count == rows.targets(range(3))
    with torch.no_grad():
        given = head_logits(model.config).of(Teacher(model)(batch))
        torch.testing.assert_close(given, torch.cat(logits), rtol=1e-4, atol=1e-4)
        assert math.isclose(float(Student(model)(batch)), total, rel_tol=1e-5)


def test_a_model_that_makes_more_of_its_head_s_outputs_is_not_trained(tmp_path, monkeypatch):
    make_model(tmp_path, "llama-3.1")
    config = AutoConfig.from_pretrained(tmp_path)
    assert head_logits(config) == HeadLogits()
    forward = LlamaForCausalLM.forward

    def squared(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits.square()
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    with pytest.raises(InputError, match="^model: is not trained: model_type 'llama' makes more of its head's outputs"):
        head_logits(config)


def test_asking_a_model_s_code_leaves_its_config_as_it_is(tmp_path):
    make_model(tmp_path, "llama-3.1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    before = model.config.to_json_string(), model.config._attn_implementation
    head_logits(model.config)
    assert (model.config.to_json_string(), model.config._attn_implementation) == before
