"""The speed of a training: tokens a second, seconds by part, and the share of a GPU's rate."""

from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.planning.training.seconds import forward_operations, operations_of_model, rate_of_gpu
from shardprune.recovery.loss_log import Loss, Losses, own_parts, parts_of
from shardprune.report.progress import Reporter
from shardprune.report.summary import summary_rows
from tests.recovery.trainings import train
from tests.support.towers import make_tower


def test_a_result_says_where_the_seconds_went(folder, tmp_path):
    kept = []
    append = Losses.append
    shown = []

    def appending(self, loss):
        append(self, loss)
        kept.append(loss)

    with (
        patch.object(Losses, "append", appending),
        patch("shardprune.report.progress.Step.describe", lambda _, detail: shown.append(detail)),
    ):
        fields = {"steps": 4, "checkpoint_every": 2, "evaluate_every": 4, "held_out": 0.2, "zero": 0}
        result = train(folder, tmp_path / "o", reporter=Reporter(quiet=True), **fields, teacher=str(folder / "dense"))
    records = {loss.step: loss for loss in kept}  # of several the last
    assert [loss.step for loss in kept] == [1, 2, 2, 3, 4, 4]
    step = {"data", "teacher", "forward", "backward", "step"}
    assert [set(records[number].parts) - step for number in (1, 2, 3, 4)] == [
        set(),
        {"checkpoint"},
        set(),
        {"held_out", "checkpoint"},
    ]
    for loss in records.values():
        assert step <= set(loss.parts)
        assert 0 < sum(seconds for _, seconds in own_parts(loss)) <= loss.seconds + 1e-4
    speed = result.throughput
    assert speed.tokens == sum(loss.tokens for loss in records.values())
    assert speed.tokens_per_second == pytest.approx(speed.tokens / sum(loss.seconds for loss in records.values()), 0.01)
    assert set(speed.seconds) == {*step, "held_out", "checkpoint", "other", "total"}
    parts = [seconds for name, seconds in speed.seconds.items() if name != "total"]
    assert speed.seconds["total"] == pytest.approx(sum(parts), abs=1e-3)
    assert speed.utilisation is None  # no rate of a CPU is known
    assert any("tokens/s" in detail and "(data " in detail and "backward " in detail for detail in shown)
    assert [row[0] for row in summary_rows(result) if "tokens/s" in row[0]] == ["training, tokens/s"]
    assert result.recovery.targets == sum(loss.targets for loss in records.values())


def test_parts_of_all_steps_are_added_up():
    figures = {"learning_rate": 0.1, "gradient_norm": 2.0, "targets": 7, "tokens": 9, "peak_bytes": 10}
    first = Loss(1, 1.0, **figures, seconds=2.0, parts={"forward": 0.5, "backward": 1.0, "checkpoint": 4.0})
    second = Loss(2, 1.0, **figures, seconds=3.0, parts={"forward": 1.0, "backward": 1.0})
    assert parts_of([first, second]) == {"forward": 1.5, "backward": 2.0, "checkpoint": 4.0, "other": 1.5}
    assert parts_of([Loss(1, 1.0, **figures, seconds=2.0)]) == {"other": 2.0}  # of a log without parts


def test_operations_of_a_forward_pass_are_those_that_are_counted(folder):
    checkpoint = Checkpoint(str(folder / "dense"))
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(model.dummy_inputs["input_ids"][:1, :4].repeat(1, 6)[:, :16], use_cache=False)
    skeleton = Skeleton(checkpoint.config, "cpu")
    counted = counter.get_total_flops() / 16
    causal = 2 * 2 * skeleton.layers * 16 * checkpoint.config.hidden_size / 2  # eager attention computes all scores
    vectors = 2 * sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert forward_operations(skeleton, 16) == pytest.approx(counted - causal + vectors, rel=1e-6)
    assert operations_of_model(skeleton, 16, full=True, masked=False) == 3 * forward_operations(skeleton, 16)
    assert operations_of_model(skeleton, 16, full=False, masked=False) == 2 * forward_operations(skeleton, 16)


def test_operations_of_layers_that_are_not_run_do_not_count(tmp_path):
    checkpoint = Checkpoint(make_tower(tmp_path, "mllama"))
    skeleton = Skeleton(checkpoint.config, "cpu")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(16)[None], use_cache=False)
    counted, run = counter.get_total_flops() / 16, [model.model.language_model.layers[index] for index in (0, 2)]
    causal = 2 * 2 * 2 * 16 * checkpoint.config.hidden_size / 2
    vectors = [p for layer in run for p in layer.parameters() if p.dim() < 2] + [model.model.language_model.norm.weight]
    expected = counted - causal + 2 * sum(p.numel() for p in vectors)
    assert forward_operations(skeleton, 16) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40", None),
        ("Tesla V100", None),
    ],
)
def test_the_rate_of_a_gpu_is_found_by_its_name(name, rate):
    assert rate_of_gpu(name, bf16=True) == rate
