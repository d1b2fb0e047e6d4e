"""Steps of a training in TensorBoard's files, and in W&B and MLflow without a network where those are installed."""

import io
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from shardprune.commands.tracking import tracked
from shardprune.errors import InputError
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recovery.loss_log import Losses
from shardprune.report.progress import Reporter
from tests.recovery.trainings import train

REPOSITORY = Path(__file__).parents[2]


def scalars(folder):
    """The scalars in TensorBoard's files, by name and step: records of length, checksum, event and checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted(folder.iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = Event.FromString(content[place + 12 : place + 12 + length])
            place += 16 + length
            for value in event.summary.value:
                assert (value.tag, event.step) not in found, "a step is there twice"
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_gets_every_step(folder, tmp_path):
    boards = tmp_path / "boards"
    fields = {"lora_rank": 4, "held_out": 0.2, "keep_sparsity": True}
    result = train(folder, tmp_path / "o", track=f"tensorboard:{boards}", **fields)
    found = scalars(boards / "o")
    losses = result.recovery.losses
    assert len(losses) == 10
    for name, field in (("loss", "loss"), ("learning_rate", "learning_rate"), ("held_out_loss", "held_out")):
        wanted = {loss.step: getattr(loss, field) for loss in losses if getattr(loss, field) is not None}
        assert {step: value for (tag, step), value in found.items() if tag == name} == pytest.approx(wanted, rel=1e-6)
    assert all(found["tokens_per_second", loss.step] > 0 for loss in losses)
    plain = train(folder, tmp_path / "plain", **fields)
    assert plain.fingerprint == result.fingerprint


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("boards", "boards/o cannot be written: .*File exists"),
        ("s3://bucket/boards", "'tensorboard:s3://bucket/boards' is a URL; use a directory of the machine"),
    ],
)
def test_a_folder_that_tensorboard_cannot_have_is_refused_before_anything_is_written(folder, place, message, tmp_path):
    (tmp_path / "boards").mkdir()
    (tmp_path / "boards" / "o").write_text("in the way")
    place = place if "://" in place else tmp_path / place
    with pytest.raises(InputError, match=f"^track: .*{message}"):
        train(folder, tmp_path / "o", lora_rank=4, track=f"tensorboard:{place}")
    assert [path.name for path in tmp_path.iterdir()] == ["boards"]


def test_a_tracker_that_refuses_is_one_line_before_anything_is_measured(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise InputError("track", "'wandb:p' cannot be opened: no key")

    monkeypatch.setattr("shardprune.commands.tracking.open_tracker", refuse)
    said = io.StringIO()
    where = {"eval": str(folder / "documents.jsonl"), "seqlen": 16, "reporter": Reporter(Console(file=said, width=300))}
    with pytest.raises(InputError, match="^track: 'wandb:p' cannot be opened: no key$"):
        train(folder, tmp_path / "o", lora_rank=4, track=f"tensorboard:{tmp_path}/boards", **where)
    assert "perplexity" not in said.getvalue()


def test_a_tracker_that_fails_is_said_once_and_the_training_goes_on(folder, tmp_path, monkeypatch):
    class Failing:
        steps = 0

        def log(self, step, values):
            self.steps += 1
            raise OSError(28, "No space left on device")

        close = log

    failing, said = Failing(), io.StringIO()
    monkeypatch.setattr("shardprune.commands.tracking.open_tracker", lambda *_: failing)
    where = {"lora_rank": 4, "track": f"tensorboard:{tmp_path}", "reporter": Reporter(Console(file=said, width=300))}
    result = train(folder, tmp_path / "o", **where)
    assert len(result.recovery.losses) == 10
    assert failing.steps == 1
    assert said.getvalue().count("gets no more steps: [Errno 28] No space left on device") == 1


def test_steps_that_a_log_has_already_are_not_reported_again(tmp_path):
    line = {"learning_rate": 0.1, "gradient_norm": 1, "targets": 3, "tokens": 4, "seconds": 2, "peak_bytes": 5}
    lines = [json.dumps({"step": step, "loss": 1 / step, **line}) + "\n" for step in (1, 2, 3)]
    recipe = RecoverRecipe(model="m", out=str(tmp_path / "o"), data="d.jsonl", track=f"tensorboard:{tmp_path}/boards")
    losses, file, said = Losses(str(tmp_path)), tmp_path / "losses.jsonl", io.StringIO()
    file.write_text(lines[0])
    with tracked(recipe, "f", losses, Reporter(Console(file=said))) as report:
        file.write_text("".join(lines[:2]))
        report(losses.read())
        file.write_text("".join(lines))
        report(losses.read())
    found = scalars(tmp_path / "boards" / "o")
    assert {step: value for (tag, step), value in found.items() if tag == "loss"} == pytest.approx({2: 0.5, 3: 1 / 3})
    assert found["tokens_per_second", 2] == 2
    assert said.getvalue() == ""


@pytest.mark.parametrize("value", ["tensorboard", "tensorboard:", "comet:x", "wandb"])
def test_what_is_no_tracker_is_refused(value):
    with pytest.raises(InputError, match=r"^track: .* is no tracker; use one of tensorboard:DIR, wandb:PROJECT, mlfl"):
        RecoverRecipe.checked({"model": "m", "out": "o", "data": "d.jsonl", "track": value})


def test_a_tracker_that_is_not_installed_is_named(folder, tmp_path):
    for kind in ("wandb", "mlflow"):
        try:
            __import__(kind)
        except ImportError:
            with pytest.raises(InputError, match=rf"^track: needs {kind}: pip install 'shardprune\[{kind}\]'$"):
                train(folder, tmp_path / "o", track=f"{kind}:x")
            assert not (tmp_path / "o").exists()


# -- in an environment of their own -------------------------------------------------------------------------------

WRITING = """
import sys
from shardprune.report.tracking import open_tracker
for steps in ((1, 2), (3,)):  # the second time as a training that goes on
    tracker = open_tracker(sys.argv[1], "runs/o", "fingerprint", {"batch": 16, "data": "alpaca", "steps": None})
    for step in steps:
        tracker.log(step, {"loss": 1 / step, "learning_rate": 0.1})
    tracker.close()
"""
FROM_MLFLOW = """
import json
from mlflow import MlflowClient
client = MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("pruned").experiment_id])
losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
print(json.dumps([run.info.run_name, run.info.status, run.data.params, losses]))
"""
# A log as LevelDB writes it: 7 bytes of its own, then checksum, length and type before each record of a block.
FROM_WANDB = """
import glob, json, struct
from wandb.proto.wandb_internal_pb2 import Record
found = []
for file in sorted(glob.glob("wandb/offline-run-*/*.wandb")):
    content, place = open(file, "rb").read(), 7
    assert len(content) < 32768, "several blocks"
    while place < len(content):
        _, length, whole = struct.unpack_from("<IHB", content, place)
        assert whole == 1
        record = Record.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length
        if record.HasField("run"):
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            found.append([record.run.display_name, record.run.project, record.run.run_id, config["batch"]])
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            found.append({name: json.loads(items[name]) for name in ("_step", "loss")})
print(json.dumps(found))
"""


def of_tracker(code, folder, *words):
    """The last line of a program in the environment that has W&B and MLflow; skips the test where there is none."""
    python = os.environ.get("TRACKERS", "")
    if not os.access(python, os.X_OK):
        pytest.skip("TRACKERS names no Python of an environment with wandb and mlflow-skinny")
    own = {
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    started = [python, "-c", code, *words]
    done = subprocess.run(started, env={**os.environ, **own}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(lines[-1]) if (lines := done.stdout.splitlines()) else None


def test_mlflow_gets_the_steps_of_a_training_that_goes_on_in_one_run(tmp_path):
    of_tracker(WRITING, tmp_path, "mlflow:pruned")
    name, status, settings, losses = of_tracker(FROM_MLFLOW, tmp_path)
    assert (name, status) == ("o", "FINISHED")
    assert settings == {"batch": "16", "data": "alpaca"}
    assert losses == {"1": 1, "2": 0.5, "3": pytest.approx(1 / 3)}


def test_wandb_gets_the_steps_of_a_training_that_goes_on_in_one_run(tmp_path):
    of_tracker(WRITING, tmp_path, "wandb:pruned")
    found = of_tracker(FROM_WANDB, tmp_path)
    runs = [entry for entry in found if isinstance(entry, list)]
    assert {(name, project, batch) for name, project, _, batch in runs} == {("o", "pruned", 16)}
    assert len({key for *_, key, _ in runs}) == 1
    losses = {entry["_step"]: entry["loss"] for entry in found if isinstance(entry, dict)}
    assert losses == {1: 1, 2: 0.5, 3: pytest.approx(1 / 3)}
