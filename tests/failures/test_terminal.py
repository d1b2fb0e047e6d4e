"""Ctrl-C in a real terminal, at the moments of a run at which it hurts most: one line, the right exit code, no process
left behind, and an output with which the same command goes on."""

import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.events import read_events
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.recovery.trainings import SHALLOW, checked, make_documents, make_sparse, recover
from tests.support.forking import forks
from tests.support.terminal import Terminal
from tests.support.tiny import differing

QUIET = Reporter(quiet=True)
STOPPED = "; what a run has finished is kept, and the same command goes on from there"
PRUNE = {
    "model": bundled_model(),
    "sparsity": 0.5,
    "calibration": "stdlib",
    "samples": 16,
    "seqlen": 128,
    "threads": 1,
    "device": "cpu",
    "report": False,
}
pytestmark = pytest.mark.timeout(600)


def words(command: str, values: dict, *own: str) -> list[str]:
    """A command line with the values of a recipe."""
    flags = {True: "--{}", False: "--no-{}"}
    options = []
    for name, value in values.items():
        if name not in own:
            flag = name.replace("_", "-")
            options += [flags[value].format(flag)] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return ["-m", "shardprune", command, *(str(values[name]) for name in own), *options]


def has(out: Path, event: str) -> bool:
    return (out / "events.jsonl").exists() and any(
        found["event"] == event for found in read_events(Folder(str(out), "out"))
    )


def check(terminal: Terminal, code: int, name: str) -> None:
    """What must hold after every end by a signal."""
    assert terminal.ended() == code, terminal.lines()
    lines = terminal.lines()
    assert [line.removeprefix("^C") for line in lines if "error: " in line] == [f"error: stopped by {name}{STOPPED}"], (
        lines
    )
    assert not any("Traceback" in line or "Exception ignored" in line for line in lines), lines
    assert terminal.left_behind() == []


# Words of a process, and a module that it imports before all that it needs is there.
IMPORTING = {
    "the command": (["shardprune", "plan", "m"], "pydantic_core._pydantic_core"),
    "a job": (["jobs.prune", "recipe.yaml"], "pydantic_core._pydantic_core"),
    "a job that waits": (["jobs.with_gpus", "2", "true"], "ray.util.placement_group"),
    "the command of lm-eval": (["shardprune.evaluation.lm_eval", "--tasks", "x"], "torch._C"),
}


@pytest.mark.parametrize("name", IMPORTING)
def test_ctrl_c_before_all_is_imported(name, tmp_path):
    words, module = IMPORTING[name]
    terminal = Terminal("-m", *words, cwd=tmp_path, suspended_at=module)
    terminal.until_suspended()
    terminal.press_ctrl_c()
    terminal.until(lambda: terminal.lines() == ["^C"])  # a busy kernel takes its time, and says this behind the signal
    terminal.process.resume()
    check(terminal, 130, "Ctrl-C")
    assert len(terminal.lines()) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "o"
    prune(Recipe.checked({**PRUNE, "out": str(out), "backend": "local"}), QUIET)
    return out


@pytest.mark.parametrize("backend", [pytest.param("local", marks=pytest.mark.long), "ray"])
def test_ctrl_c_in_the_middle_of_pruning(backend, undisturbed, tmp_path):
    out = tmp_path / "o"
    asked = {**PRUNE, "out": out, "backend": backend, "shards": 1}
    terminal = Terminal(*words("prune", asked, "model"), cwd=tmp_path)
    terminal.until(lambda: has(out, "layer"))
    terminal.press_ctrl_c()
    check(terminal, 130, "Ctrl-C")
    assert read_events(Folder(str(out), "out"))[-1]["event"] == "stopped"
    result = prune(Recipe.checked({**PRUNE, "out": str(out), "backend": "local"}), QUIET)
    assert result.restarts == 0
    assert differing(undisturbed, out) == []


@pytest.mark.long
def test_sigterm_while_ray_starts(tmp_path):
    out = tmp_path / "o"
    terminal = Terminal(*words("prune", {**PRUNE, "out": out, "backend": "ray"}, "model"), cwd=tmp_path)
    terminal.until(lambda: any(child.name() == "gcs_server" for child in terminal.process.children()))
    terminal.process.terminate()
    check(terminal, 143, "SIGTERM")


@pytest.mark.long
def test_a_terminal_that_is_closed_in_the_middle_of_pruning(undisturbed, tmp_path):
    """The kernel sends SIGHUP, and nothing can be said any more."""
    out = tmp_path / "o"
    terminal = Terminal(*words("prune", {**PRUNE, "out": out, "backend": "local"}, "model"), cwd=tmp_path)
    terminal.until(lambda: has(out, "layer"))
    terminal.close()
    assert terminal.ended() == 129
    assert terminal.left_behind() == []
    assert read_events(Folder(str(out), "out"))[-1]["event"] == "stopped"
    prune(Recipe.checked({**PRUNE, "out": str(out), "backend": "local"}), QUIET)
    assert differing(undisturbed, out) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healed")
    make_sparse(folder / "sparse", configs=SHALLOW)
    make_documents(folder / "documents.jsonl")
    return folder


LONG = {"steps": 48, "checkpoint_every": 4}


@pytest.mark.parametrize(
    ("backend", "file"), [("local", "rows.safetensors"), pytest.param("ray", "latest", marks=pytest.mark.long)]
)
def test_ctrl_c_during_recovery(backend, file, folder, tmp_path):
    """While DeepSpeed starts in this process, and once a checkpoint stands on Ray, whose training has a handler of its
    own for Ctrl-C; its eight workers are forks, those of the pruning above are Ray's own."""
    out = tmp_path / "o"
    values = checked(folder, out, **LONG, backend=backend).model_dump(exclude_unset=True)
    with forks() if backend == "ray" else nullcontext():
        terminal = Terminal(*words("recover", {**values, "report": False}, "model"), cwd=tmp_path)
        terminal.until((out / "training" / file).exists)
        time.sleep(0.5)  # rows are read after DeepSpeed's imports have begun
        terminal.press_ctrl_c()
        check(terminal, 130, "Ctrl-C")
    assert read_events(Folder(str(out), "out"))[-1]["event"] == "stopped"
    if backend == "ray":
        assert (out / "training" / "latest").read_text().startswith("step")
        resumed = recover(checked(folder, out, **LONG, backend="local", report=False), QUIET)
        assert resumed.recovery.steps == LONG["steps"]
