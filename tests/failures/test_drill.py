"""The failure drill: actors, nodes, drivers and the storage die in turn, in every phase of a run.

Every entry is a run over two one-slot Ray nodes beside the head to which one thing happens. What must hold is always
the same: the output is that of an undisturbed run to the bit, no finished layer was done again, and no file that was
not whole was ever there to be read.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.events import read_events
from shardprune.report.progress import Reporter
from shardprune.report.result import Result
from shardprune.storage.folder import Folder
from tests.failures.listening import Heard, Moment
from tests.failures.nodes import Nodes, nodes
from tests.failures.watching import watched
from tests.support.s3 import S3, client_of, serve
from tests.support.tiny import differing, load_tensors

# When it happens: in which step and at which share of it, or as a phase begins.
MOMENTS = {
    "plan": ("begin plan", 0.0),
    "observe": ("observe", 0.3),
    "prune": ("prune", 0.5),
    "evaluate": ("perplexity after", 0.3),
    "write": ("begin write", 0.0),
}
pytestmark = pytest.mark.timeout(600)  # on a busy machine processes take minutes to start
PARALLEL = {"shards": 2, "segments": 4, "propagation": "parallel", "allocation": "owl"}


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
    with serve() as server, client_of(server):
        server.put(bundled_model(), f"{server.bucket('models')}/stdlib-4m")
        server.bucket("runs")
        yield server


@pytest.fixture(scope="module")
def cluster(s3):
    """Nodes that find the storage in their environment."""
    with nodes(2) as cluster:
        yield cluster


def recipe(out: Path | str, **fields) -> Recipe:
    values = {
        "model": bundled_model(),
        "out": str(out),
        "sparsity": 0.5,
        "calibration": "stdlib",
        "samples": 24,
        "seqlen": 64,
        "wave": 4,
        "eval": ("stdlib",),
        "eval_windows": 12,
        "threads": 1,
        **fields,
    }
    return Recipe.checked(values)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[..., tuple[Path, Result]]:
    """The output and the result of the same run in one process to which nothing happens, by its settings."""
    made: dict[str, tuple[Path, Result]] = {}

    def get(**fields) -> tuple[Path, Result]:
        key = str(sorted(fields.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "o"
            made[key] = out, prune(recipe(out, backend="local", **fields), Reporter(quiet=True))
        return made[key]

    return get


def check(out: Path, result: Result, undisturbed: tuple[Path, Result]) -> None:
    """What must hold after every failure."""
    assert differing(undisturbed[0], out) == []
    assert result.perplexity == undisturbed[1].perplexity
    assert result.sparsity == undisturbed[1].sparsity
    events = read_events(Folder(str(out), "out"))
    made = Counter(event["layer"] for event in events if event["event"] == "layer")
    assert set(made.values()) == {1}, "a layer was done again"
    # Whoever dies between a layer's file and its event takes that along; the next attempt finds the file.
    found = {layer for event in events if event["event"] == "attempt" for layer in event["finished"]}
    assert found | made.keys() == set(range(8))
    assert not [name for name in Folder(str(out), "out").names() if name.endswith(".tmp")]


BARBER = {**PARALLEL, "rebuild": "barber", "rebuild_threshold": 0.1}
LOSSES = [
    ("actor", "observe", PARALLEL),
    ("actor", "prune", BARBER),
    ("actor", "evaluate", PARALLEL),
    ("node", "plan", PARALLEL),
    ("node", "observe", PARALLEL),
    ("node", "prune", {**PARALLEL, "weights": "streamed"}),
    ("node", "evaluate", PARALLEL),
]


@pytest.mark.parametrize(("victim", "when", "fields"), LOSSES, ids=[f"{victim}-{when}" for victim, when, _ in LOSSES])
def test_workers_die(cluster: Nodes, undisturbed, victim, when, fields, tmp_path):
    moment = Moment(*MOMENTS[when], cluster.kill_node if victim == "node" else cluster.kill_actor)
    # A run that starts when a node is gone has one slot less, which changes nothing where its segments are given.
    asked = {**fields, "shards": None} if when == "plan" else fields
    try:
        with watched(tmp_path / "o") as written:
            result = prune(recipe(tmp_path / "o", address=cluster.address, **asked), Heard(moment))
    finally:
        cluster.repair()
    assert moment.passed
    # A node that goes before a worker is on it may be missed when workers are placed, or before.
    assert result.restarts in ((0, 1) if when == "plan" else (1,))
    if victim == "node":
        assert len(result.workers) == 1
    check(tmp_path / "o", result, undisturbed(**fields))
    assert len(written) == 9


@pytest.mark.parametrize("victim", ["actor", "node"])
def test_workers_die_in_the_middle_of_an_upload(cluster: Nodes, s3: S3, undisturbed, victim, tmp_path):
    """The storage has the request for a layer's file, and what would have sent it is gone."""
    out = f"runs/{victim}"
    s3.clear()
    kill = cluster.kill_node if victim == "node" else cluster.kill_actor
    upload = s3.faults.call(kill, f"PUT {out}/model-0000", skip=2)
    try:
        result = prune(recipe(f"s3://{out}", address=cluster.address, **PARALLEL), Reporter(quiet=True))
    finally:
        cluster.repair()
    assert upload.hits > 2
    assert result.restarts == 1
    assert s3.uploads("runs") == []
    check(s3.get(out, tmp_path / "o"), result, undisturbed(**PARALLEL))


@pytest.mark.parametrize("when", ["plan", "observe", "prune", "evaluate", "write"])
def test_the_driver_dies(cluster: Nodes, undisturbed, when, tmp_path):
    # One of them has a cluster of its own, which must end with it.
    asked = recipe(tmp_path / "o", address=None if when == "prune" else cluster.address, **PARALLEL)
    name, share = MOMENTS[when]
    workers: list[psutil.Process] = []
    command = [sys.executable, "-m", "tests.failures.listening", asked.model_dump_json()]
    with watched(tmp_path / "o") as written:
        errors = (tmp_path / "errors").open("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
        with errors, subprocess.Popen(command, **pipes, text=True, bufsize=1) as driver:
            assert driver.stdin is not None
            assert driver.stdout is not None

            def kill() -> None:
                workers.extend(cluster.workers())
                driver.kill()

            moment = Moment(name, share, kill)
            for line in driver.stdout:
                moment(*json.loads(line))
                if not moment.passed:
                    driver.stdin.write("\n")
        assert moment.passed, (tmp_path / "errors").read_text()
        assert not (tmp_path / "o" / "result.json").exists()
        assert when in ("plan", "write") or len(workers) == 2
        assert psutil.wait_procs(workers, timeout=240)[1] == [], "workers outlived their driver"
        before = dict(written)
        result = prune(recipe(tmp_path / "o", address=cluster.address, **PARALLEL), Reporter(quiet=True))
    assert before.items() <= written.items()
    check(tmp_path / "o", result, undisturbed(**PARALLEL))


def test_the_storage_goes_away_in_every_phase(cluster: Nodes, s3: S3, undisturbed, tmp_path):
    s3.clear()
    seconds = dict.fromkeys(MOMENTS, 1.0) | {"prune": 4.0}
    moments = [Moment(*MOMENTS[when], partial(s3.faults.down, seconds[when])) for when in MOMENTS]

    def listen(name: str, share: float) -> None:
        for moment in moments:
            moment(name, share)

    asked = recipe("s3://runs/storage", model="s3://models/stdlib-4m", address=cluster.address, **PARALLEL)
    result = prune(asked, Heard(listen))
    assert all(moment.passed for moment in moments)
    assert s3.uploads("runs") == []
    check(s3.get("runs/storage", tmp_path / "o"), result, undisturbed(**PARALLEL))


def test_a_lost_replica_changes_no_more_than_rounding(cluster: Nodes, undisturbed, tmp_path):
    fields = {"replicas": 2, "shards": 1, "seqlen": 128}
    moment = Moment(*MOMENTS["prune"], cluster.kill_node)
    try:
        result = prune(recipe(tmp_path / "o", address=cluster.address, **fields), Heard(moment))
    finally:
        cluster.repair()
    assert moment.passed
    assert (result.restarts, len(result.workers)) == (1, 1)
    out, expected = undisturbed(**fields)
    assert result.perplexity["stdlib"].after == pytest.approx(expected.perplexity["stdlib"].after, rel=1e-3)
    ours, theirs = load_tensors(tmp_path / "o"), load_tensors(out)
    for name, tensor in ours.items():
        # Sums of two halves round otherwise than one sum, which may move a zero and then what makes up for it.
        assert ((tensor == 0) != (theirs[name] == 0)).float().mean() < 1e-3, f"{name} has other zeros"
        assert (tensor - theirs[name]).norm() < 0.1 * theirs[name].norm(), f"{name} differs"
