"""Inputs and outputs that change under a run, and two runs in one output."""

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from shardprune import Recipe, prune
from shardprune.cli import main
from shardprune.errors import InputError, StorageError
from shardprune.report.progress import Reporter
from tests.failures.driving import Driver
from tests.failures.listening import Heard, Moment
from tests.support.forking import forks
from tests.support.tiny import differing, load_tensors, make_model, make_tokens, snapshot

HALFWAY = ("prune", 0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changes")
    make_model(folder / "given")
    make_model(folder / "other")
    tensors = load_tensors(folder / "other")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "other" / "model.safetensors")
    make_tokens(folder / "tokens.npy")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder):
    prune(recipe(folder, folder / "undisturbed", model=folder / "given"), Reporter(quiet=True))
    return folder / "undisturbed"


@pytest.fixture(scope="module")
def forked():
    """Commands are forks."""
    with forks():
        yield


@pytest.fixture
def model(folder, tmp_path) -> Path:
    """A copy of the model, which may be changed."""
    return shutil.copytree(folder / "given", tmp_path / "model")


def recipe(folder, out, model, **fields) -> Recipe:
    values = {"calibration": str(folder / "tokens.npy"), "samples": 12, "seqlen": 24, "wave": 4, "sparsity": 0.5}
    values |= {"eval": (str(folder / "tokens.npy"),), "backend": "local", "threads": 1, "report": False}
    return Recipe.checked({**values, "model": str(model), "out": str(out), **fields})


def replaced(model: Path, other: Path) -> None:
    shutil.copyfile(other / "model.safetensors", model / "new")
    os.replace(model / "new", model / "model.safetensors")


def overwritten(model: Path, other: Path) -> None:
    shutil.copyfile(other / "model.safetensors", model / "model.safetensors")


def truncated(model: Path, other: Path) -> None:
    os.truncate(model / "model.safetensors", 50_000)


def removed(model: Path, other: Path) -> None:
    (model / "model.safetensors").unlink()


CHANGES: tuple[Callable[[Path, Path], None], ...] = (replaced, overwritten, truncated, removed)


@pytest.mark.parametrize("weights", ["resident", "streamed"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_model_that_changes_under_a_run_ends_it(folder, model, undisturbed, change, weights, tmp_path):
    moment = Moment(*HALFWAY, lambda: change(model, folder / "other"))
    with pytest.raises(StorageError, match=r"^model: [^\n]*model\.safetensors[^\n]*$"):
        prune(recipe(folder, tmp_path / "o", model, weights=weights), Heard(moment))
    assert moment.passed
    assert not (tmp_path / "o" / "result.json").exists()
    # With the model that it began with, the same command goes on.
    shutil.copyfile(folder / "given" / "model.safetensors", model / "model.safetensors")
    prune(recipe(folder, tmp_path / "o", model, weights=weights), Reporter(quiet=True))
    assert differing(undisturbed, tmp_path / "o") == []


def test_an_output_that_is_renamed_under_a_run_ends_it(folder, model, undisturbed, tmp_path):
    out, elsewhere = tmp_path / "o", tmp_path / "elsewhere"
    moment = Moment(*HALFWAY, lambda: out.rename(elsewhere))
    # A file may be under way: then it is the first that has no place any more.
    with pytest.raises(StorageError, match=r"^out: [^\n]*(is not this run's any more|cannot be written)[^\n]*$"):
        prune(recipe(folder, out, model), Heard(moment))
    assert moment.passed
    shutil.rmtree(out, ignore_errors=True)
    elsewhere.rename(out)
    prune(recipe(folder, out, model), Reporter(quiet=True))
    assert differing(undisturbed, out) == []


def test_a_layer_that_is_removed_under_a_run_is_missed(folder, model, undisturbed, tmp_path):
    out = tmp_path / "o"
    moment = Moment("begin write", 0.0, lambda: next(iter(sorted(out.glob("model-00003*")))).unlink())
    with pytest.raises(StorageError, match=r"^out: [^\n]*model-00003-of-00005\.safetensors[^\n]*$"):
        prune(recipe(folder, out, model), Heard(moment))
    assert moment.passed
    assert not (out / "result.json").exists()
    prune(recipe(folder, out, model), Reporter(quiet=True))
    assert differing(undisturbed, out) == []


def words(folder, out, model) -> list[str]:
    fields = recipe(folder, out, model)
    options = [f"--{name}={getattr(fields, name)}" for name in ("samples", "seqlen", "wave", "sparsity")]
    text = (f"--calibration={fields.calibration[0]}", f"--eval={fields.eval[0]}")
    return ["prune", fields.model, f"--out={out}", *text, *options, *COMMON]


COMMON = ("--backend=local", "--threads=1", "--no-report")


@pytest.mark.long  # tests/storage/test_owner.py shows it without two commands
def test_the_same_command_twice_at_once_is_refused(folder, model, undisturbed, forked, tmp_path, capsys):
    out = tmp_path / "o"
    before: dict[str, bytes] = {}

    def start_another() -> None:
        before.update(snapshot(out))
        with pytest.raises(SystemExit) as ended:
            main(words(folder, out, model))
        assert ended.value.code == 2

    # The first one is a process of its own, stopped while the second one is tried.
    first = Driver(words(folder, out, model), tmp_path / "first")
    while not any(line.startswith("prune ") for line in first.told()):
        assert not first.over(), first.lines()
    first.process.suspend()
    start_another()
    assert snapshot(out) == before
    first.process.resume()
    assert first.wait(240)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: out: {out} is in use by another run (process {first.process.pid} on ")
    assert first.code == 0, first.lines()
    assert differing(undisturbed, out) == []
    assert not (out / "owner.json").exists()


def test_two_commands_that_start_together_are_one_run(folder, model, undisturbed, forked, tmp_path):
    """Both find the output free; the first to claim it makes it."""
    out = tmp_path / "o"
    started = [Driver(words(folder, out, model), tmp_path / str(number)) for number in range(2)]
    assert all(driver.wait(240) for driver in started)
    codes = sorted(driver.code for driver in started if driver.code is not None)
    assert codes in ([0, 0], [0, 2]), [driver.lines() for driver in started]  # one may be over before the other looks
    assert differing(undisturbed, out) == []


def test_a_run_that_is_refused_leaves_the_other_ones_record(folder, model, tmp_path):
    out = tmp_path / "o"
    with pytest.raises(InputError):
        prune(recipe(folder, out, model, samples=99), Reporter(quiet=True))
    assert not (out / "owner.json").exists()


@pytest.mark.parametrize("command", ["plan", "prune"])
@pytest.mark.parametrize("why", ["is full", "does not exist"])
def test_a_temporary_folder_that_cannot_be_used_is_one_line(folder, model, why, command, tmp_path, capsys, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or the first bytes of modules stay
    if why == "does not exist":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    arguments = words(folder, tmp_path / "o", model) if command == "prune" else ["plan", str(model), "--seqlen=24"]
    try:
        if why == "is full":  # of any file there is room for the first bytes alone
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    output = capsys.readouterr()
    assert (ended.value.code, output.out) == (2, "")
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("error: TMPDIR: no temporary file can be written: ")
    assert not (tmp_path / "o").exists()
