"""Workers that are stopped or come to a standstill: they are found, named and replaced as dead ones are."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from shardprune import mop, prune
from shardprune.cluster.ray_backend import RayGroup
from shardprune.report.events import read_events
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from tests.cluster.on_ray.material import bundled, search
from tests.failures.listening import Heard, Moment
from tests.support.clusters import PATIENCE, processes_of
from tests.support.entries import entries
from tests.support.tiny import differing

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Outputs of one process, by their names: of a run on one replica, on two, and of a search."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ways = {
        "store": lambda out: prune(bundled(out, backend="local"), QUIET),
        "group": lambda out: prune(bundled(out, backend="local", replicas=2), QUIET),
        "search": lambda out: mop(search(out, backend="local"), QUIET),
    }

    def get(name: str) -> Path:
        if not (folder / name).exists():
            ways[name](folder / name)
        return folder / name

    return get


def stopped(*actors: str) -> psutil.Process:
    """Stop the last process of actors of these classes, as a debugger or a full swap does."""
    process = processes_of(*actors)[-1]
    process.send_signal(signal.SIGSTOP)
    return process


def lost(out) -> str:
    """The reason of the only loss of a run."""
    (event,) = [event for event in read_events(Folder(str(out), "out")) if event["event"] == "lost"]
    return event["reason"]


def before(monkeypatch, name: str, action, *args) -> None:
    """Do something to an actor of a group before the first call of a verb on it, with these first arguments."""
    submit, armed = RayGroup.submit, [True]

    def submitted(self, shard, replica, verb, *given):
        if armed and verb.__name__ == name and given[: len(args)] == args:
            armed.clear()
            action(self, self._actors[shard, replica])
        return submit(self, shard, replica, verb, *given)

    monkeypatch.setattr(RayGroup, "submit", submitted)


# A stopped worker is told from those that wait for it: through the object store, and in a process group.
HANGS = {
    "store": {"shards": 2},
    "group": {"replicas": 2, "exchange": "group"},
}


@pytest.mark.parametrize("exchange", entries(HANGS.keys(), "store"))
def test_a_stopped_worker_is_replaced(ray, undisturbed, exchange, tmp_path):
    processes = []
    moment = Moment("prune", 0.4, lambda: processes.append(stopped("PruneActor")))
    result = prune(bundled(tmp_path / "o", patience=PATIENCE, **HANGS[exchange]), Heard(moment))
    assert result.restarts == 1
    assert f"(process {processes[0].pid} on {socket.gethostname()}) has given no sign of life" in lost(tmp_path / "o")
    assert not processes[0].is_running()
    assert differing(undisturbed(exchange), tmp_path / "o") == []


@pytest.mark.long
def test_a_stopped_worker_costs_a_search_one_iteration(ray, undisturbed, tmp_path):
    processes = []
    moment = Moment("iteration 3", 0.5, lambda: processes.append(stopped("MopActor")))
    result = mop(search(tmp_path / "o", shards=2, patience=PATIENCE), Heard(moment))
    assert result.restarts == 1
    assert f"(process {processes[0].pid} on {socket.gethostname()}) has given no sign of life" in lost(tmp_path / "o")
    assert not processes[0].is_running()
    assert differing(undisturbed("search"), tmp_path / "o") == []


def stand_still(_group, actor) -> None:
    """Let an actor's next call of a verb wait for what never happens."""

    def hang(worker) -> None:
        worker.ledger.begin = threading.Event().wait

    import ray

    ray.get(actor.__ray_call__.remote(hang))


@pytest.mark.long
def test_a_worker_in_a_deadlock_is_replaced(ray, undisturbed, tmp_path, monkeypatch):
    before(monkeypatch, "solve", stand_still, 2)
    result = prune(bundled(tmp_path / "o", patience=PATIENCE), QUIET)
    assert result.restarts == 1
    assert "has been at layer 2, solve" in lost(tmp_path / "o")
    assert "without any use of the processor" in lost(tmp_path / "o")
    assert differing(undisturbed("store"), tmp_path / "o") == []


@pytest.mark.long
def test_a_worker_in_a_deadlock_costs_a_search_one_iteration(ray, undisturbed, tmp_path, monkeypatch):
    before(monkeypatch, "narrow", stand_still, 5)
    result = mop(search(tmp_path / "o", patience=PATIENCE), QUIET)
    assert result.restarts == 1
    assert "has been at layer 5, narrow" in lost(tmp_path / "o")
    assert "without any use of the processor" in lost(tmp_path / "o")
    assert differing(undisturbed("search"), tmp_path / "o") == []


@pytest.mark.long
def test_a_worker_that_stops_while_it_starts_is_replaced(ray, tmp_path, monkeypatch):
    def stop(group, actor) -> None:
        pid = ray.get(actor.__ray_call__.remote(lambda worker: os.getpid()))
        while group._board.read(0) is None:  # for its first sign it has minutes
            time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)

    before(monkeypatch, "start", stop)
    assert prune(bundled(tmp_path / "o", patience=PATIENCE), QUIET).restarts == 1
