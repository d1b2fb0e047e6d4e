"""A place that cannot be written to is said before any text is read, which may be a download of hours."""

import socket

import pytest

from shardprune.cli import main
from shardprune.storage.owner import OwnerRecord
from tests.support.tiny import make_model, snapshot

TEXTS = ["--calibration", "{}/nowhere.txt", "--eval", "{}/nowhere.txt", "--seqlen", "24"]
COMMANDS = {
    "prune": ["prune", "{}/model", "--sparsity", "0.5", *TEXTS],
    "structures": ["prune", "{}/model", "--structured", "0.2", *TEXTS],
    "composite": ["prune", "{}/model", "--structured", "0.2", "--sparsity", "0.5", *TEXTS],
    "rebuild": ["rebuild", "{}/model", "{}/model", *TEXTS],
    "mop": ["mop", "{}/model", "--remove", "0.3", *TEXTS],
    "recover": ["recover", "{}/model", "--data", "{}/nowhere.txt", "--length", "24"],
    "evaluate": ["evaluate", "{}/model", "--perplexity", "{}/nowhere.txt", "--seqlen", "24"],
    "pipeline": ["pipeline", "{}/pipeline.yaml"],
}
PIPELINE = """
model: {}/model
prune: {{sparsity: 0.5, calibration: {}/nowhere.txt, seqlen: 24}}
evaluate: {{perplexity: {}/nowhere.txt, seqlen: 24}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    make_model(folder / "model", "llama-3.1")
    (folder / "pipeline.yaml").write_text(PIPELINE.replace("{}", str(folder)).replace("{{", "{").replace("}}", "}"))
    (folder / "occupied").mkdir()
    (folder / "occupied" / "notes.txt").write_text("mine")
    (folder / "file").write_text("mine")
    (folder / "claimed").mkdir()
    record = OwnerRecord(host=socket.gethostname(), boot="an earlier one", process=1, started=0.0, time=0.0)
    (folder / "claimed" / "owner.json").write_text(record.model_dump_json())
    (folder / "started").mkdir()
    (folder / "started" / "run.json").write_text('{"fingerprint": "of another"}')
    return folder


def said(folder, capsys, name, *words):
    before = snapshot(folder)
    with pytest.raises(SystemExit) as ended:
        main([*(word.replace("{}", str(folder)) for word in COMMANDS[name]), "--backend", "local", *words])
    assert ended.value.code == 2
    assert snapshot(folder) == before
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_output_is_said_first(place, capsys, name):
    for out in ("occupied", "file/below"):
        assert said(place, capsys, name, "--out", str(place / out)).startswith("error: out: ")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "evaluate"])
def test_a_run_that_may_not_be_resumed_is_said_first(place, capsys, name):
    assert said(place, capsys, name, "--out", str(place / "started"), "--no-resume").startswith("error: out: ")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("rebuild", "pipeline")])
def test_then_the_text(place, capsys, name):
    error = said(place, capsys, name, "--out", str(place / "free"))
    assert "nowhere.txt' does not exist" in error


@pytest.mark.parametrize("name", COMMANDS)
def test_the_record_of_a_process_that_was_killed_before_it_did_anything_is_nobodys(place, capsys, name):
    assert not said(place, capsys, name, "--out", f"{place}/claimed").startswith("error: out: ")
