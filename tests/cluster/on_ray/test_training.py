"""Trainings in Ray Train's workers: the same as in one process, and a real kill."""

import re
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ray.train import get_context

from shardprune.cluster import ray_training
from shardprune.cluster.ray_leftovers import free_leftovers
from shardprune.cluster.ray_training import _ends_an_attempt
from shardprune.errors import InputError
from shardprune.recovery.training import Training
from shardprune.report.events import read_events
from shardprune.storage.folder import Folder
from tests.recovery.trainings import (
    QUIET,
    SHALLOW,
    checked,
    furthest,
    losses,
    make_documents,
    make_sparse,
    recover,
    same_zeros,
    train,
)
from tests.support.clusters import PATIENCE, processes_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray-training")
    make_sparse(folder / "sparse", configs=SHALLOW)
    make_documents(folder / "documents.jsonl")
    return folder


def test_more_workers_than_the_cluster_has(ray, folder, tmp_path):
    with pytest.raises(InputError, match="workers: 8 workers need as many CPUs; the cluster has 4"):
        recover(checked(folder, tmp_path / "o", workers=8, batch=16), QUIET)
    assert not (tmp_path / "o").exists()


FULL = {"full": True, "keep_sparsity": True, "held_out": 0.2, "steps": 32, "checkpoint_every": 8}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Output and result of the same training in one process to which nothing happens."""
    out = tmp_path_factory.mktemp("alone") / "o"
    return out, train(folder, out, zero=0, **FULL)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_lost_worker_costs_the_steps_since_the_last_checkpoint(ray, folder, alone, number, tmp_path):
    """One that is killed, and one that is stopped: the other waits for it in a collective."""
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 240  # on a busy machine processes take minutes to start
        checkpoint = tmp_path / "o" / "training" / "latest"
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process = processes_of("RayTrainWorker")[0]
        process.send_signal(number)
        killed.extend((checkpoint.read_text(), process))

    killer = threading.Thread(target=kill)
    killer.start()
    handler = signal.getsignal(signal.SIGINT)
    result = recover(checked(folder, tmp_path / "o", zero=3, workers=2, patience=PATIENCE, **FULL), QUIET)
    assert signal.getsignal(signal.SIGINT) is handler  # Ray Train's own would ignore Ctrl-C from then on
    killer.join()
    assert killed
    assert killed[0] != f"step{FULL['steps']}"
    if number == signal.SIGSTOP:
        (lost,) = [event for event in read_events(Folder(str(tmp_path / "o"), "out")) if event["event"] == "lost"]
        assert f"(process {killed[1].pid} on" in lost["reason"]
        assert "has given no sign of life" in lost["reason"]
        assert not killed[1].is_running()
    assert (result.restarts, result.recovery.workers) == (1, 2)
    assert [worker.replica for worker in result.workers] == [0, 1]
    assert losses(result) == pytest.approx(losses(alone[1]), abs=1e-4)
    assert furthest(tmp_path / "o", alone[0]) < 1e-4
    assert same_zeros(folder / "sparse", tmp_path / "o")
    assert not (tmp_path / "o" / "training").exists()


@pytest.mark.long
def test_a_training_whose_director_dies_is_started_again(ray, folder, tmp_path):
    """Ray Train has an actor of its own that starts the workers and hears of their ends."""
    out, killed = tmp_path / "o", []

    def kill() -> None:
        while not (out / "training" / "latest").exists() and not ended.is_set():
            time.sleep(0.02)
        killed.extend(processes_of("TrainController"))
        for process in killed:
            process.kill()

    ended = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        result = recover(checked(folder, out, workers=2, steps=40), QUIET)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 1
    assert (result.restarts, len(result.recovery.losses)) == (1, 40)
    free_leftovers()  # Ray keeps the slots of what the director had placed
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 4


@pytest.mark.long
def test_a_training_that_stands_still_is_started_again(ray, folder, tmp_path, monkeypatch):
    """One process waits for what never happens, the other one for it in a collective."""
    work, marker = ray_training._work, tmp_path / "stood still"

    def hanging(config) -> None:
        if get_context().get_world_rank() == 1 and not marker.exists():
            step = Training._step

            def stand_still(training, number, upcoming):
                if number == 2:
                    marker.touch()
                    threading.Event().wait()
                return step(training, number, upcoming)

            Training._step = stand_still
        work(config)

    monkeypatch.setattr(ray_training, "_work", hanging)
    out = tmp_path / "o"
    result = recover(checked(folder, out, workers=2, patience=PATIENCE, steps=4), QUIET)
    reasons = [event["reason"] for event in read_events(Folder(str(out), "out")) if event["event"] == "lost"]
    assert re.match(r"training worker 1 \(process .* without any use of the processor", "\n".join(reasons)), reasons
    assert marker.exists()
    assert (result.restarts, len(result.recovery.losses)) == (1, 4), reasons


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ValueError("a fault of the program"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_new_processes_go_on_after_a_gpu_or_a_link_fails(error, ends):
    assert _ends_an_attempt(error) is ends
