"""From a recipe to result.json in this process."""

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from shardprune.errors import InputError, TrainingError
from shardprune.report.progress import Reporter
from shardprune.report.result import TrainingLoss
from shardprune.storage.relative_paths import absolute_paths
from tests.recovery.trainings import checked, loss_of, losses, rows_of, train, zeros
from tests.support.tiny import load_tensors, make_tokens, snapshot

UPDATES = {"lora_rank": 4, "keep_sparsity": True}


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """A training with everything that is measured: output, result and what it said."""
    make_tokens(folder / "other.npy", samples=5, seqlen=24, seed=1)
    out, said = tmp_path_factory.mktemp("recover") / "o", io.StringIO()
    fields = {**UPDATES, "held_out": 0.2, "eval": (str(folder / "other.npy"),), "seqlen": 24}
    result = train(folder, out, reporter=Reporter(Console(file=said, width=300)), **fields)
    return out, result, said.getvalue(), fields


def perplexity(model, file):
    windows = torch.from_numpy(np.load(file))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(windows).logits
    return math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


def test_the_result_says_what_was_done(folder, done):
    out, result, said, fields = done
    stored = json.loads((out / "result.json").read_text())
    assert absolute_paths(stored, str(out)) == result.as_json()
    assert stored["command"] == "recover"
    assert stored["recipe"].items() >= {"zero": 2, "lora_rank": 4, "workers": 1, "precision": "fp32"}.items()
    learned, held_out = rows_of(checked(folder, "o", **fields))
    recovery = stored["recovery"]
    assert (recovery["steps"], recovery["workers"]) == (10, 1)
    assert (recovery["rows"], recovery["held_out_rows"]) == (len(learned), len(held_out))
    order = torch.cat([learned.order(epoch, 0) for epoch in range(10)])[:80].tolist()
    assert recovery["targets"] == learned.targets(order)
    shapes = [tensor.shape for name, tensor in load_tensors(folder / "sparse").items() if "_proj" in name]
    assert recovery["parameters_trained"] == sum(4 * (rows + cols) for rows, cols in shapes)
    assert [record["step"] for record in recovery["losses"]] == list(range(1, 11))
    assert [record["step"] for record in recovery["losses"] if "held_out" in record] == [4, 8, 10]
    assert recovery["losses"][-1]["held_out"] == pytest.approx(loss_of(out, held_out), abs=1e-5)
    assert recovery["losses"][0]["loss"] == pytest.approx(
        loss_of(folder / "sparse", learned.select(order[:8])), abs=1e-4
    )
    assert {record["update"] for record in stored["sparsity"]["projections"]} == {"products"}
    assert stored["seconds"].keys() >= {"plan", "load", "train", "write", "evaluate"}
    (worker,) = stored["workers"]
    assert worker["peak_bytes"] > 0
    assert worker["busy_seconds"] > 0
    assert "recover" in said
    assert "will be lost" not in said


def test_zeros_are_counted_on_what_was_written(folder, done):
    out, result, *_ = done
    before, after = zeros(folder / "sparse"), zeros(out)
    share = [sum(map(torch.sum, found.values())) / sum(map(torch.numel, found.values())) for found in (before, after)]
    assert result.sparsity.before == pytest.approx(float(share[0]))
    assert result.sparsity.achieved == pytest.approx(float(share[1]))
    assert result.recovery.zeros_before == sum(map(torch.sum, before.values()))
    assert result.recovery.zeros_after == sum(map(torch.sum, after.values()))
    assert len(result.sparsity.projections) == 14
    assert len(result.sparsity.layers) == 2


def test_perplexity_is_measured_before_and_after(folder, done):
    out, result, *_ = done
    (record,) = result.perplexity.values()
    assert record.before == pytest.approx(perplexity(folder / "sparse", folder / "other.npy"), rel=1e-5)
    assert record.after == pytest.approx(perplexity(out, folder / "other.npy"), rel=1e-5)
    assert (record.windows, record.seqlen) == (5, 24)


RECORDS = {"README.md", "result.json", "events.jsonl", "report.html"}


def test_the_output_is_a_checkpoint_and_nothing_else(folder, done):
    out, *_ = done
    companions = {path.name for path in (folder / "sparse").iterdir()} - {"model.safetensors"}
    model = {f"model-{number:05d}-of-00003.safetensors" for number in range(1, 4)} | {"model.safetensors.index.json"}
    assert {path.name for path in out.iterdir()} == companions | model | RECORDS


def test_a_finished_training_is_not_done_again(folder, done):
    out, result, _, fields = done
    before, said = snapshot(out), io.StringIO()
    again = train(folder, out, reporter=Reporter(Console(file=said, width=500)), zero=2, threads=2, **fields)
    assert again == result
    assert said.getvalue().split() == [str(out), "is", "finished", "already"]
    assert snapshot(out) == before


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 1e-3}, {"steps": 11}, {"lora_rank": 5}, {"seed": 1}, {"zero": 1}, {"held_out": 0.3}],
    ids=str,
)
def test_another_training_does_not_go_there(folder, done, change):
    out, _, _, fields = done
    before = snapshot(out)
    with pytest.raises(InputError, match="^out: .* holds another run; choose an empty directory$"):
        train(folder, out, **{**fields, **change})
    assert snapshot(out) == before


def test_what_was_not_measured_is_added_later(folder, done, tmp_path):
    fields = {**UPDATES, "steps": 2}
    first = train(folder, tmp_path / "o", **fields)
    tensors = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("*.safetensors")}
    second = train(folder, tmp_path / "o", eval=(str(folder / "other.npy"),), seqlen=24, **fields)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("*.safetensors")} == tensors
    assert first.perplexity == {}
    (record,) = second.perplexity.values()
    assert record.before != record.after
    assert second.recovery == first.recovery
    assert second.workers == first.workers


def test_zeros_that_will_be_lost_are_spoken_of(folder, tmp_path):
    said = io.StringIO()
    train(folder, tmp_path / "o", reporter=Reporter(Console(file=said, width=300)), steps=2, lora_rank=4)
    count = sum(int(found.sum()) for found in zeros(folder / "sparse").values())
    lines = [line for line in said.getvalue().splitlines() if "zeros" in line]
    assert lines == [f"{count:,} zeros (49.9% of the projections' weights) will be lost; --keep-sparsity keeps them"]
    said = io.StringIO()
    train(
        folder, tmp_path / "d", reporter=Reporter(Console(file=said, width=300)), steps=1, model=str(folder / "dense")
    )
    assert "zeros" not in said.getvalue()


def test_settings_of_deepspeeds_own_reach_it(folder, tmp_path):
    (tmp_path / "ds.json").write_text('{"optimizer": {"params": {"betas": [0.0, 0.5]}}}')
    fields = {**UPDATES, "steps": 3}
    plain = train(folder, tmp_path / "plain", **fields)
    changed = train(folder, tmp_path / "changed", deepspeed=str(tmp_path / "ds.json"), **fields)
    assert losses(changed)[:2] == pytest.approx(losses(plain)[:2], abs=1e-3)  # the first update is the sign alone
    assert losses(changed)[2] != pytest.approx(losses(plain)[2], abs=1e-5)


def test_the_state_may_lie_elsewhere(folder, tmp_path):
    train(folder, tmp_path / "o", state=str(tmp_path / "state"), steps=1, **UPDATES)
    assert not (tmp_path / "state").exists()
    assert not (tmp_path / "o" / "training").exists()


def test_a_training_that_diverges_ends_with_one_line(folder, tmp_path):
    with pytest.raises(TrainingError, match=r"^step \d+: the loss is .*; use a lower learning rate$"):
        train(folder, tmp_path / "o", full=True, learning_rate=1e30)
    assert not (tmp_path / "o" / "result.json").exists()


def test_measuring_more_keeps_an_evaluation(folder, tmp_path):
    make_tokens(folder / "more.npy", samples=3, seqlen=24, seed=2)
    fields = {"lora_rank": 2, "steps": 1, "seqlen": 24}
    train(folder, tmp_path / "o", **fields)
    file = tmp_path / "o" / "result.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps({**stored, "evaluation": {"harness": "kept"}}))
    result = train(folder, tmp_path / "o", eval=(str(folder / "more.npy"),), **fields)
    assert result.evaluation.harness == "kept"
    assert set(result.perplexity) == {str(folder / "more.npy")}
    assert result.recovery.losses == [TrainingLoss(**loss) for loss in stored["recovery"]["losses"]]


def test_low_rank_updates_in_bf16_do_not_round_the_weights_they_join(folder, tmp_path):
    train(folder, tmp_path / "o", lora_rank=2, steps=1, learning_rate=1e-12, precision="bf16", zero=1)
    before, after = load_tensors(folder / "sparse"), load_tensors(tmp_path / "o")
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
