"""Divergence from a teacher's largest predictions against the formula, and against that from all of them."""

import pytest
import torch

import shardprune.recovery.distillation
from shardprune.model.head_logits import HeadLogits
from shardprune.recovery.distillation import TopDistillation, WholeDistillation, largest, put_together

PLACES, VOCABULARY, TEMPERATURE, CAP = 7, 12, 1.7, 3.0


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Three chunks of predictions, the last one not full."""
    monkeypatch.setattr(shardprune.recovery.distillation, "CHUNK", 3)


def logits(seed):
    return 3 * torch.randn(PLACES, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def exact(student, teacher, top, temperature, cap=None):
    """The divergence of every place in turn, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for given, wanted in zip(student, teacher.double(), strict=True):
        if cap is not None:
            wanted = cap * torch.tanh(wanted / cap)
        p, q = torch.softmax(wanted / temperature, 0), torch.softmax(given / temperature, 0)
        best = p.argsort(descending=True)[:top]
        others = [token for token in range(VOCABULARY) if token not in best]
        for alike in (*best[:, None], torch.tensor(others)):
            mass = p[alike].sum()
            total = total + temperature**2 * mass * (mass.log() - q[alike].sum().log())
    return total


def stored(teacher, top, cap=None, temperature=TEMPERATURE):
    return TopDistillation(*largest(teacher, HeadLogits(cap=cap), temperature, top), temperature, 0.5)


@pytest.mark.parametrize("top", [1, 4, VOCABULARY - 1])
@pytest.mark.parametrize("cap", [None, CAP])
def test_the_divergence_and_its_gradient_are_the_formula(top, cap):
    student, teacher = logits(1).double().requires_grad_(), logits(2)
    expected = exact(student, teacher, top, TEMPERATURE, cap)
    (wanted,) = torch.autograd.grad(expected, student)
    before = student.detach().float()
    loss, gradient = stored(teacher, top, cap).divergence(before)
    # Stored log-probabilities have eleven bits.
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradient.double(), wanted, rtol=5e-3, atol=5e-3)
    assert torch.equal(before, student.detach().float())  # which the loss of the data is computed from, too


def test_more_predictions_never_say_less_and_all_say_what_all_logits_say():
    student, teacher = logits(3), logits(4)
    whole, towards = WholeDistillation(teacher, HeadLogits(), TEMPERATURE, 0.5).divergence(student)
    found = [stored(teacher, top).divergence(student)[0] for top in range(1, VOCABULARY)]
    assert found == sorted(found)
    assert found[0] > 0
    assert found[3] < 0.98 * whole
    loss, gradient = stored(teacher, VOCABULARY - 1).divergence(student)
    torch.testing.assert_close(loss, whole, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradient, towards, rtol=5e-3, atol=5e-3)


def test_the_divergence_of_a_teacher_from_itself_is_nothing():
    teacher = logits(5)
    loss, gradient = stored(teacher, 4).divergence(teacher)
    assert 0 <= float(loss) < 1e-4
    assert gradient.abs().max() < 2e-3


def test_the_largest_predictions_are_those_of_a_softmax():
    teacher = logits(6)
    tokens, chances = largest(teacher, HeadLogits(), TEMPERATURE, 3)
    whole = torch.log_softmax(teacher.double() / TEMPERATURE, 1)
    wanted, places = whole.sort(descending=True)
    assert (tokens.dtype, chances.dtype) == (torch.int32, torch.float16)
    assert torch.equal(tokens.long(), places[:, :3])
    torch.testing.assert_close(chances[:, :3].double(), wanted[:, :3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(chances[:, 3].double(), wanted[:, 3:].logsumexp(1), rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.cat([largest(row[None], HeadLogits(), TEMPERATURE, 3)[1] for row in teacher]), chances)


def test_a_teacher_that_is_sure_leaves_the_others_nothing():
    """Their mass is less than any number of 16 bits says, and neither loss nor gradient is affected by that."""
    teacher = torch.zeros(1, VOCABULARY)
    teacher[0, 5] = 1e6
    distillation = stored(teacher, 2)
    assert bool(torch.isfinite(distillation.chances).all())
    student = logits(7)[:1]
    loss, gradient = distillation.divergence(student)
    chances = torch.softmax(student / TEMPERATURE, 1)
    torch.testing.assert_close(loss, -(TEMPERATURE**2) * chances[0, 5].log())
    chances[0, 5] -= 1
    torch.testing.assert_close(gradient, TEMPERATURE * chances)


def test_chances_that_are_put_together_are_a_distribution():
    scaled, tokens = logits(8), torch.tensor([[1, 5]] * PLACES)
    chances, rest = put_together(scaled.clone(), tokens)
    torch.testing.assert_close(chances.exp().sum(1), torch.ones(PLACES))
    assert torch.equal(rest == -torch.inf, torch.zeros_like(rest, dtype=torch.bool).scatter_(1, tokens, True))
