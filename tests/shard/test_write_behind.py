"""A layer's file behind the layer in work: what waits for it, and what becomes of it when the run ends before."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import shardprune.shard.write_behind as write_behind
from shardprune.errors import SolverError, StorageError
from shardprune.report.events import read_events
from shardprune.shard.prune_worker import PruneWorker
from shardprune.shard.write_behind import WriteBehind
from shardprune.storage.folder import Folder
from tests.support.running import run
from tests.support.tiny import differing

CPU = torch.device("cpu")


class Gate:
    """A file system on which files of a name take until the gate opens."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = Folder._write_and_rename

        def slow(folder, file, parts):
            def held():
                for part in parts:
                    yield part
                    if file == name:
                        self.reached.set()
                        assert self.open.wait(60)

            write(folder, file, held())

        monkeypatch.setattr(Folder, "_write_and_rename", slow)


@contextmanager
def noted(monkeypatch, *verbs: str):
    """The calls of some verbs of pruning workers, in their order."""
    calls: list[tuple[str, int]] = []
    with monkeypatch.context() as patch:
        for name in verbs:
            method = getattr(PruneWorker, name)

            def noting(self, *args, _name=name, _method=method):
                calls.append((_name, args[_method.layer]))
                return _method(self, *args)

            noting.kind, noting.layer, noting.__name__ = method.kind, method.layer, name
            patch.setattr(PruneWorker, name, noting)
        yield calls


def files(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*model-*"))


def test_a_layer_is_in_work_while_the_file_of_the_one_before_is_written(folder, tmp_path, monkeypatch):
    gate = Gate(monkeypatch, "model-00002-of-00005.safetensors")  # of layer 0
    solve = PruneWorker.solve
    seen: list[tuple[list[str], list[str]]] = []

    def watched(self, index, *args):
        reports = solve(self, index, *args)
        if index == 1 and not gate.open.is_set():
            assert gate.reached.wait(60)
            events = [event["event"] for event in read_events(Folder(str(tmp_path / "o"), "out"))]
            seen.append((files(tmp_path / "o"), events))
            gate.open.set()
        return reports

    watched.kind, watched.layer, watched.__name__ = solve.kind, solve.layer, "solve"
    monkeypatch.setattr(PruneWorker, "solve", watched)
    run(folder, tmp_path / "o", sparsity=0.5)
    ((present, events),) = seen
    assert [name.startswith(".model-00002") for name in present] == [True], "only a part, under another name"
    assert "layer" not in events
    monkeypatch.undo()
    run(folder, tmp_path / "plain", sparsity=0.5)
    assert differing(tmp_path / "o", tmp_path / "plain") == []


@pytest.mark.parametrize(
    "fields", [{"shards": 2}, {"segments": 2, "propagation": "parallel"}, {"replicas": 2}], ids=str
)
def test_one_file_is_under_way_at_a_time(folder, tmp_path, monkeypatch, fields):
    with noted(monkeypatch, "write", "written", "finish", "propagate") as calls:
        run(folder, tmp_path / "o", sparsity=0.5, **fields)
    steps = [call for call in dict.fromkeys(calls) if call[0] != "propagate"]
    expected = [("write", 0), ("finish", 0)]
    for layer in (1, 2, 3):
        expected += [("written", layer - 1), ("write", layer), ("finish", layer)]
    assert steps == [*expected, ("written", 3)]
    assert calls.index(("propagate", 0)) < calls.index(("written", 0))


def test_a_layer_that_cannot_be_solved_leaves_the_one_before_it_finished(folder, tmp_path, monkeypatch):
    solve = PruneWorker.solve

    def failing(self, index, *args):
        if index == 2:
            raise SolverError("layer 2 has no solution")
        return solve(self, index, *args)

    failing.kind, failing.layer, failing.__name__ = solve.kind, solve.layer, "solve"
    monkeypatch.setattr(PruneWorker, "solve", failing)
    with pytest.raises(SolverError):
        run(folder, tmp_path / "o", sparsity=0.5)
    events = read_events(Folder(str(tmp_path / "o"), "out"))
    assert [event["layer"] for event in events if event["event"] == "layer"] == [0, 1]
    assert len(files(tmp_path / "o")) == 2


def test_a_full_disk_ends_the_run_and_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    write = Folder._write_and_rename

    def full(self, name, parts):
        def cut():
            yield from [next(iter(parts))]
            raise OSError(28, "No space left on device")

        write(self, name, cut() if name == "model-00003-of-00005.safetensors" else parts)

    monkeypatch.setattr(Folder, "_write_and_rename", full)
    with pytest.raises(
        StorageError, match=r"out: .*model-00003-of-00005.safetensors cannot be written: .*No space left"
    ):
        run(folder, tmp_path / "o", sparsity=0.5)
    assert files(tmp_path / "o") == ["model-00002-of-00005.safetensors"]
    monkeypatch.undo()
    events = read_events(Folder(str(tmp_path / "o"), "out"))
    assert [event["layer"] for event in events if event["event"] == "layer"] == [0]
    run(folder, tmp_path / "o", sparsity=0.5)
    run(folder, tmp_path / "plain", sparsity=0.5)
    assert differing(tmp_path / "o", tmp_path / "plain") == []


KILLED = """
import os, signal, sys
from pathlib import Path
from shardprune.shard.prune_worker import PruneWorker
from shardprune.storage.folder import Folder
from tests.support.running import run

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
write, solve = Folder._write_and_rename, PruneWorker.solve
import threading
reached = threading.Event()

def slow(self, name, parts):
    def held():
        for part in parts:
            yield part
            if name == "model-00003-of-00005.safetensors":
                reached.set()
                threading.Event().wait(60)
    write(self, name, held())

def killing(self, index, *args):
    if index == 2:
        assert reached.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
    return solve(self, index, *args)

killing.kind, killing.layer, killing.__name__ = solve.kind, solve.layer, "solve"
Folder._write_and_rename, PruneWorker.solve = slow, killing
run(folder, out, sparsity=0.5)
"""


@pytest.mark.long
def test_a_run_killed_between_a_layers_write_and_its_file_does_that_layer_again(folder, tmp_path):
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "o")]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = [name for name in files(tmp_path / "o") if not name.startswith(".")]
    assert whole == ["model-00002-of-00005.safetensors"]
    run(folder, tmp_path / "o", sparsity=0.5)
    attempts = [e["finished"] for e in read_events(Folder(str(tmp_path / "o"), "out")) if e["event"] == "attempt"]
    assert attempts == [[], [0]]
    run(folder, tmp_path / "plain", sparsity=0.5)
    assert differing(tmp_path / "o", tmp_path / "plain") == []
    assert not list((tmp_path / "o").glob(".*"))


@pytest.mark.parametrize("in_time", [True, False])
def test_a_run_that_is_stopped_finishes_the_file_under_way_or_gives_it_up(folder, tmp_path, monkeypatch, in_time):
    gate = Gate(monkeypatch, "model-00003-of-00005.safetensors")
    monkeypatch.setattr(write_behind, "GRACE_SECONDS", 60.0 if in_time else 0.01)
    solve, end = PruneWorker.solve, WriteBehind.close

    def stopped(self, index, *args):
        if index == 2:
            assert gate.reached.wait(60)
            raise KeyboardInterrupt
        return solve(self, index, *args)

    def closing(self):
        """The gate opens while the file is waited for, or once it has been given up."""

        def given_up() -> None:
            assert self._abandoned.wait(60)
            gate.open.set()

        opening = threading.Timer(0.3, gate.open.set) if in_time else threading.Thread(target=given_up)
        opening.start()
        end(self)
        opening.join()

    stopped.kind, stopped.layer, stopped.__name__ = solve.kind, solve.layer, "solve"
    monkeypatch.setattr(PruneWorker, "solve", stopped)
    monkeypatch.setattr(WriteBehind, "close", closing)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "o", sparsity=0.5)
    names = ["model-00002-of-00005.safetensors", "model-00003-of-00005.safetensors"]
    assert files(tmp_path / "o") == names[: 2 if in_time else 1]


def test_tensors_of_a_cpu_are_written_from_where_they_are():
    behind = WriteBehind(CPU)
    one = torch.ones(3)
    found = []

    def write(tensor) -> int:
        found.append((tensor("one"), tensor("other")))
        return 12

    behind.begin(4, {"one": one}, write)
    with pytest.raises(AssertionError, match="is not written"):
        behind.begin(5, {}, write)
    assert behind.wait(4) == 12
    ((same, none),) = found
    assert same.data_ptr() == one.data_ptr()
    assert none is None
    with pytest.raises(AssertionError, match="no layer"):
        behind.wait(4)
    behind.close()
