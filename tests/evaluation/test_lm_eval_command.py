"""lm-eval's own command, with shardprune's model in it."""

import json
import runpy
import sys

import pytest
from lm_eval.api.registry import get_model

from shardprune import process
from shardprune.errors import InputError
from tests.evaluation.material import evaluated, make_readable, write_task


@pytest.mark.long
def test_the_command_knows_the_model(tmp_path, monkeypatch):
    model = make_readable(tmp_path / "model")
    write_task(tmp_path / "tasks", "words", documents=20)
    command = ["lm_eval", "--model", "shardprune"]
    command += ["--model_args", f"pretrained={model},shards=2,backend=local,threads=2"]
    command += ["--tasks", "words", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(process, "quick_to_end", lambda: None)  # of a process of its own
    with pytest.raises(SystemExit) as ending:
        runpy.run_module("shardprune.evaluation.lm_eval", run_name="__main__")
    assert ending.value.code == 0
    (stored,) = (tmp_path / "o").rglob("results_*.json")
    found = json.loads(stored.read_text())
    own = evaluated(model, tasks="words", tasks_dir=str(tmp_path / "tasks"), shards=2).evaluation.tasks["words"]
    assert found["results"]["words"]["acc,none"] == own.metrics["acc"].value
    assert found["results"]["words"]["acc_stderr,none"] == own.metrics["acc"].stderr
    assert found["config"]["model"] == "shardprune"


def test_the_model_by_its_name(tmp_path):
    import shardprune.evaluation.harness  # noqa: F401  registers it

    model = make_readable(tmp_path / "model")
    given = {"pretrained": model, "backend": "local", "shards": 2}
    lm = get_model("shardprune").create_from_arg_obj(given, {"batch_size": "auto", "device": "cuda:0"})
    assert (lm.max_length, lm.model.settings.wave, lm.model.layout.workers) == (64, None, 2)
    lm = get_model("shardprune").create_from_arg_string(f"pretrained={model},backend=local", {"batch_size": 3})
    assert lm.model.settings.wave == 3
    with pytest.raises(InputError, match="shard: no field of a recipe has this name; did you mean shards"):
        get_model("shardprune").create_from_arg_obj({**given, "shard": 2})
    with pytest.raises(InputError, match="pretrained: missing; name a checkpoint, as pretrained=MODEL"):
        get_model("shardprune").create_from_arg_obj({"backend": "local"})
