"""Models that change under a training, and trained outputs that are damaged."""

import os
import shutil
from unittest.mock import patch

import pytest

from shardprune.commands.check import check
from shardprune.errors import InputChanged, InputError
from shardprune.recovery.loss_log import Losses
from tests.recovery.trainings import train
from tests.support.tiny import snapshot

SHORT = {"steps": 1, "lora_rank": 2, "zero": 1}
FILE = "model.safetensors"


@pytest.mark.parametrize("changing", ["model", "teacher"])
def test_a_model_that_changes_while_it_is_trained(folder, tmp_path, changing):
    names = {"model": folder / "sparse", "teacher": folder / "dense"}
    names[changing] = shutil.copytree(names[changing], tmp_path / changing)
    append = Losses.append

    def changes(self, loss):
        os.replace(shutil.copy(names[changing] / FILE, tmp_path / "new"), names[changing] / FILE)
        append(self, loss)

    fields = {**SHORT, "model": str(names["model"])}
    if changing == "teacher":
        fields["teacher"] = str(names["teacher"])
    with patch.object(Losses, "append", changes), pytest.raises(InputChanged) as caught:
        train(folder, tmp_path / "out", **fields)
    assert str(caught.value).startswith(f"{changing}: the model changed under the run: {names[changing]}/{FILE} is not")
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_trained_output_is_made_whole_again_where_that_takes_no_training(folder, tmp_path):
    out = tmp_path / "out"
    train(folder, out, **SHORT)
    (verdict,) = check(str(out))
    assert not verdict.faults
    before = snapshot(out)
    (out / "config.json").unlink()
    os.truncate(out / "model-00001-of-00003.safetensors", 500)
    with patch("shardprune.commands.recover.RecoveryRun._share_inputs", side_effect=AssertionError("trains again")):
        train(folder, out, **SHORT)
    after = snapshot(out)
    assert {name for name in before if before[name] != after[name]} <= {"result.json", "events.jsonl", "report.html"}
    (out / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match="is not whole: model-00002-of-00003.safetensors is missing; choose an empty"):
        train(folder, out, **SHORT)
