"""The failure drill: actors, nodes, drivers and the storage die in turn, in every phase of a run.

Every entry is a run over two one-slot Ray nodes beside the head to which one thing happens. What must hold is always
the same: the output is that of an undisturbed run to the bit, no finished layer was done again, and no file that was
not whole was ever there to be read.
"""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import psutil
import pytest

from shardprune import Recipe, prune
from shardprune.recipes.demo import bundled_model
from shardprune.report.events import read_events
from shardprune.report.progress import Reporter
from shardprune.report.result import Result
from shardprune.storage.folder import Folder
from tests.failures import listening
from tests.failures.listening import Heard, Moment
from tests.failures.nodes import Nodes, nodes
from tests.failures.watching import watched
from tests.support.entries import entries
from tests.support.forking import fork
from tests.support.s3 import S3, client_of, serve
from tests.support.tiny import CONFIGS, differing, load_tensors, make_model, make_tokens

# When it happens: in which step and at which share of it, or as a phase begins.
MOMENTS = {
    "plan": ("begin plan", 0.0),
    "observe": ("observe", 0.3),
    "prune": ("prune", 0.5),
    "evaluate": ("perplexity after", 0.3),
    "write": ("begin write", 0.0),
}
pytestmark = pytest.mark.timeout(600)  # on a busy machine processes take minutes to start
CONFIG = {**CONFIGS["llama"][1], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
PARALLEL = {"shards": 2, "segments": 4, "propagation": "parallel", "allocation": "owl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of eight small layers, and texts."""
    folder = tmp_path_factory.mktemp("drill")
    make_model(folder / "model", configs={"llama-3.1": ("LlamaConfig", CONFIG)})
    make_tokens(folder / "tokens.npy", 24, 48)
    make_tokens(folder / "other.npy", 12, 48, seed=1)
    return folder


@pytest.fixture(scope="module")
def s3(folder):
    pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
    with serve() as server, client_of(server):
        server.put(folder / "model", f"{server.bucket('models')}/model")
        server.bucket("runs")
        yield server


@pytest.fixture(scope="module")
def cluster(s3):
    """Nodes that find the storage in their environment."""
    with nodes(2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(folder) -> Callable[..., Recipe]:
    """Recipes of runs over the model, by their output."""

    def of(out: Path | str, **fields) -> Recipe:
        values = {
            "model": str(folder / "model"),
            "out": str(out),
            "sparsity": 0.5,
            "calibration": str(folder / "tokens.npy"),
            "samples": 24,
            "seqlen": 48,
            "wave": 4,
            "eval": (str(folder / "other.npy"),),
            "eval_windows": 12,
            "threads": 1,
            **fields,
        }
        return Recipe.checked(values)

    return of


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory) -> Callable[..., tuple[Path, Result]]:
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


# Passes whose waves workers have before the first has come back: they must take longer than a death.
LARGER = {"model": bundled_model(), "calibration": "stdlib", "eval": ("stdlib",), "eval_windows": 48, "seqlen": 64}
LONG = {**PARALLEL, **LARGER}
BARBER = {**PARALLEL, "rebuild": "barber", "rebuild_threshold": 0.1}
IMPROVED = {**PARALLEL, "weights": "streamed", "targets": "stream", "reconstruct": 4}
LOSSES = [
    ("node", "prune", IMPROVED),
]
MORE_LOSSES = [
    ("actor", "prune", BARBER),
    ("node", "evaluate", LONG),
    ("actor", "observe", LONG),
    ("actor", "evaluate", LONG),
    ("node", "plan", PARALLEL),
    ("node", "observe", LONG),
]


@pytest.mark.parametrize(
    ("victim", "when", "fields"),
    [pytest.param(*one, id="-".join(one[:2])) for one in LOSSES]
    + [pytest.param(*one, id="-".join(one[:2]), marks=pytest.mark.long) for one in MORE_LOSSES],
)
def test_workers_die(recipe, cluster: Nodes, undisturbed, victim, when, fields, tmp_path):
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


@pytest.mark.long  # tests/storage/test_runs.py shows it in one process
@pytest.mark.parametrize("victim", ["actor", "node"])
def test_workers_die_in_the_middle_of_an_upload(recipe, cluster: Nodes, s3: S3, undisturbed, victim, tmp_path):
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


@contextmanager
def run_of(asked: Recipe, errors: Path) -> Iterator[tuple[int, TextIO, TextIO]]:
    """A run in a process of its own, which is forked: its number, what it tells, and where it is answered."""
    (told, out), (inside, told_back) = os.pipe(), os.pipe()
    with errors.open("w") as err, open(told) as heard, open(told_back, "w", buffering=1) as answers:
        fork([listening.__file__, asked.model_dump_json()], [inside, out, err.fileno()], dict(os.environ))
        os.close(inside)
        os.close(out)
        yield int(heard.readline()), heard, answers


@pytest.mark.parametrize("when", entries(list(MOMENTS), "plan", "observe", "evaluate", "write"))
def test_the_driver_dies(recipe, cluster: Nodes, undisturbed, when, tmp_path):
    # One of them has a cluster of its own, which must end with it.
    asked = recipe(tmp_path / "o", address=None if when == "prune" else cluster.address, **PARALLEL)
    name, share = MOMENTS[when]
    workers: list[psutil.Process] = []
    with watched(tmp_path / "o") as written:
        with run_of(asked, tmp_path / "errors") as (pid, heard, answers):

            def kill() -> None:
                workers.extend(cluster.workers())
                os.kill(pid, signal.SIGKILL)

            moment = Moment(name, share, kill)
            for line in heard:
                moment(*json.loads(line))
                if not moment.passed:
                    answers.write("\n")
        assert moment.passed, (tmp_path / "errors").read_text()
        assert not (tmp_path / "o" / "result.json").exists()
        assert when in ("plan", "write") or len(workers) == 2
        assert psutil.wait_procs(workers, timeout=240)[1] == [], "workers outlived their driver"
        before = dict(written)
        result = prune(recipe(tmp_path / "o", address=cluster.address, **PARALLEL), Reporter(quiet=True))
    assert before.items() <= written.items()
    check(tmp_path / "o", result, undisturbed(**PARALLEL))


@pytest.mark.long  # tests/storage/test_runs.py shows it in one process
def test_the_storage_goes_away_in_every_phase(recipe, cluster: Nodes, s3: S3, undisturbed, tmp_path):
    s3.clear()
    seconds = dict.fromkeys(MOMENTS, 1.0) | {"prune": 4.0}
    moments = [Moment(*MOMENTS[when], partial(s3.faults.down, seconds[when])) for when in MOMENTS]

    def listen(name: str, share: float) -> None:
        for moment in moments:
            moment(name, share)

    asked = recipe("s3://runs/storage", model="s3://models/model", address=cluster.address, **PARALLEL)
    result = prune(asked, Heard(listen))
    assert all(moment.passed for moment in moments)
    assert s3.uploads("runs") == []
    check(s3.get("runs/storage", tmp_path / "o"), result, undisturbed(**PARALLEL))


@pytest.mark.long
def test_a_lost_replica_changes_no_more_than_rounding(recipe, cluster: Nodes, undisturbed, tmp_path):
    fields = {**LARGER, "replicas": 2, "shards": 1, "seqlen": 128}
    moment = Moment(*MOMENTS["prune"], cluster.kill_node)
    try:
        result = prune(recipe(tmp_path / "o", address=cluster.address, **fields), Heard(moment))
    finally:
        cluster.repair()
    assert moment.passed
    assert (result.restarts, len(result.workers)) == (1, 1)
    out, expected = undisturbed(**fields)
    (measured,), (wanted,) = result.perplexity.values(), expected.perplexity.values()
    assert measured.after == pytest.approx(wanted.after, rel=1e-3)
    ours, theirs = load_tensors(tmp_path / "o"), load_tensors(out)
    for name, tensor in ours.items():
        # Sums of two halves round otherwise than one sum, which may move a zero and then what makes up for it.
        assert ((tensor == 0) != (theirs[name] == 0)).float().mean() < 1e-3, f"{name} has other zeros"
        assert (tensor - theirs[name]).norm() < 0.1 * theirs[name].norm(), f"{name} differs"
