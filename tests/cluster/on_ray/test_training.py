"""Trainings in Ray Train's workers: the same as in one process, and a real kill."""

import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from shardprune.cluster.ray_training import _ends_an_attempt
from shardprune.errors import InputError
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
from tests.support.clusters import cluster, processes_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray-training")
    make_sparse(folder / "sparse", configs=SHALLOW)
    make_documents(folder / "documents.jsonl")
    return folder


@pytest.fixture(scope="module")
def ray():
    """One cluster of this machine for all tests of this file."""
    with cluster(2) as ray:
        yield ray


def test_more_workers_than_the_cluster_has(ray, folder, tmp_path):
    with pytest.raises(InputError, match="workers: 4 workers need as many CPUs; the cluster has 2"):
        recover(checked(folder, tmp_path / "o", workers=4), QUIET)
    assert not (tmp_path / "o").exists()


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(ray, folder, tmp_path):
    fields = {"full": True, "keep_sparsity": True, "held_out": 0.2, "steps": 40, "checkpoint_every": 10}
    alone = train(folder, tmp_path / "alone", zero=0, **fields)
    killed = []

    def kill() -> None:
        deadline = time.monotonic() + 240  # on a busy machine processes take minutes to start
        checkpoint = tmp_path / "o" / "training" / "latest"
        while not checkpoint.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        processes_of("RayTrainWorker")[0].send_signal(signal.SIGKILL)
        killed.append(checkpoint.read_text())

    killer = threading.Thread(target=kill)
    killer.start()
    result = recover(checked(folder, tmp_path / "o", zero=3, workers=2, **fields), QUIET)
    killer.join()
    assert killed
    assert killed[0] != "step40"
    assert (result.restarts, result.recovery.workers) == (1, 2)
    assert [worker.replica for worker in result.workers] == [0, 1]
    assert losses(result) == pytest.approx(losses(alone), abs=1e-4)
    assert furthest(tmp_path / "o", tmp_path / "alone") < 1e-4
    assert same_zeros(folder / "sparse", tmp_path / "o")
    assert not (tmp_path / "o" / "training").exists()


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
