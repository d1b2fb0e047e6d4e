"""The losses against Hugging Face's own and against a loop."""

import math

import torch
from transformers import AutoModelForCausalLM

from shardprune.recovery.loss import hard_loss, soft_loss
from shardprune.recovery.rows import IGNORED


def logits_and_labels():
    torch.manual_seed(0)
    labels = torch.randint(0, 9, (3, 7))
    labels[torch.rand(3, 7) < 0.4] = IGNORED
    return torch.randn(3, 7, 9), torch.randn(3, 7, 9), labels


def test_the_hard_loss_is_hugging_faces_times_the_tokens_that_count(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "sparse")
    _, _, labels = logits_and_labels()
    tokens = torch.randint(0, 64, labels.shape)
    with torch.no_grad():
        output = model(tokens, labels=labels)
    count = int((labels[:, 1:] != IGNORED).sum())
    torch.testing.assert_close(hard_loss(output.logits, labels), output.loss * count)


def test_the_soft_loss_is_the_divergence_of_every_prediction_that_counts():
    student, teacher, labels = logits_and_labels()
    temperature = 1.7
    total = 0.0
    for row in range(3):
        for place in range(1, 7):
            if labels[row, place] == IGNORED:
                continue
            wanted = torch.softmax(teacher[row, place - 1] / temperature, 0).tolist()
            given = torch.softmax(student[row, place - 1] / temperature, 0).tolist()
            total += temperature**2 * sum(p * math.log(p / q) for p, q in zip(wanted, given, strict=True))
    assert abs(float(soft_loss(student, teacher, labels, temperature)) - total) < 1e-4
    assert abs(float(soft_loss(teacher, teacher, labels, temperature))) < 1e-6


def test_losses_are_computed_in_float32():
    student, teacher, labels = (
        tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in logits_and_labels()
    )
    hard, soft = hard_loss(student, labels), soft_loss(student, teacher, labels, 2.0)
    assert hard.dtype == soft.dtype == torch.float32
    torch.testing.assert_close(hard, hard_loss(student.float(), labels))
    torch.testing.assert_close(soft, soft_loss(student.float(), teacher.float(), labels, 2.0))


def test_nothing_that_counts_is_a_loss_of_zero():
    student, teacher, labels = logits_and_labels()
    nothing = torch.full_like(labels, IGNORED)
    assert float(hard_loss(student, nothing)) == float(soft_loss(student, teacher, nothing, 2.0)) == 0
