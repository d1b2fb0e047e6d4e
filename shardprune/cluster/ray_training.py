"""The processes of a training run as Ray Train's workers, connected by torch's process group.

Ray Train restarts nothing: the driver owns recovery, as in all commands, so that a run may resume with fewer workers.
Checkpoints go to shared storage without Ray: reports to Ray just before a worker's death may be lost.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from shardprune.cluster.patience import Patience, sign_seconds
from shardprune.cluster.ray_leftovers import free_leftovers
from shardprune.cluster.ray_signs import Board, kill
from shardprune.errors import InputError, StorageError, TrainingError, WorkerLost, first_line
from shardprune.recovery.spec import TrainingSpec
from shardprune.recovery.worker import train_worker
from shardprune.shard.device_errors import context_is_dead
from shardprune.shard.signs import Calls
from shardprune.signals import handlers_kept
from shardprune.storage.folder import Folder

# After which a collective that no process died of fails: a link hangs. Ray reports a dead process much sooner.
COLLECTIVE_SECONDS = 30 * 60
# Ray Train's own patience, for workers that hang before their first sign of life.
HEALTH = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"


class Reports:
    """The reports of one attempt's workers in the training directory: measurements or errors.

    A worker that dies leaves no report, and neither do those whose collectives fail because of it.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        self._folder = Folder(spec.recipe.state, "state")

    def clear(self) -> None:
        for name in self._names():
            self._folder.remove(name)

    def write(self, rank: int, report: dict[str, Any]) -> None:
        self._folder.write_json(f"worker-{rank:05d}.json", report)

    def read(self) -> list[dict[str, Any]]:
        """Return the reports in the order of the workers."""
        return [self._folder.read_json(name) for name in self._names()]

    def _names(self) -> list[str]:
        return [name for name in self._folder.names() if name.startswith("worker-")]


def train_on_ray(spec: TrainingSpec, workers: int, cpus: int, patience: float) -> list[dict[str, Any]]:
    """Train on the connected cluster with `cpus` CPUs per worker; return every worker's measurements.

    Args:
        patience: seconds after which a worker that hangs is lost.

    Raises:
        InputError: the cluster does not free the workers' resources, or as `train_worker`.
        StorageError, TrainingError: as `train_worker`.
        WorkerLost: a worker or its node died.
    """
    gpu = spec.recipe.device == "cuda"
    reports = Reports(spec)
    reports.clear()
    board = Board(sign_seconds(patience))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"spec": spec, "board": board},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            name="ray",
            storage_path=spec.recipe.state,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    watch = _Watch(board, workers, patience)
    try:
        # Ray Train has a handler of its own for Ctrl-C, which neither ends the run nor says so, and leaves it behind.
        with handlers_kept(), _environment(HEALTH, f"{patience:g}"), watch:
            trainer.fit()
    except TrainingFailedError as error:
        if watch.lost:
            raise watch.lost from error
        for wrong in (report["error"] for report in reports.read() if "error" in report):
            if wrong is None:
                raise
            raise _named(**wrong) from error
        if isinstance(error, ControllerError) and "Timeout" in type(error.controller_failure).__name__:
            wanted = f"{workers} x {cpus} CPUs" + (" and a GPU" if gpu else "")
            raise InputError("address", f"the cluster did not free {wanted} in time") from error
        raise WorkerLost("one of the training's processes died") from error
    except RayActorError as error:  # of Ray Train's own, which tells the others what to do
        raise watch.lost or WorkerLost("the process that directs the training died") from error
    return reports.read()


class _Watch:
    """A thread that looks at the signs of the workers, and kills one that hangs: that ends the training. It also frees
    the slots of an attempt before, for which this one may wait."""

    def __init__(self, board: Board, workers: int, patience: float) -> None:
        self.lost: WorkerLost | None = None
        names = [f"training worker {rank}" for rank in range(workers)]
        self._board, self._patience = board, Patience(names, patience, board.read, training=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._board.clear()

    def _look(self) -> None:
        while not self._over.wait(self._patience.between_looks):
            try:
                self._patience.look()
            except WorkerLost as error:
                self.lost = error
                kill(self._patience.hanging)
                return
            free_leftovers()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable in the block, unless it is set already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _work(config: dict[str, Any]) -> None:
    """Run in every worker: train and leave a report."""
    spec: TrainingSpec = config["spec"]
    reports, rank = Reports(spec), get_context().get_world_rank()
    device = get_device() if spec.recipe.device == "cuda" else torch.device("cpu")
    calls = Calls()
    signs = config["board"].give_signs(rank, calls)
    try:
        with calls.during("training"):
            measured = train_worker(spec, device)
        reports.write(rank, measured)
    except (InputError, StorageError) as error:
        told = {"text": error.problem, "field": error.field, "storage": isinstance(error, StorageError)}
        reports.write(rank, {"error": told})
        raise
    except TrainingError as error:
        reports.write(rank, {"error": {"text": first_line(error)}})
        raise
    except Exception as error:
        if not _ends_an_attempt(error):
            reports.write(rank, {"error": None})
        raise
    finally:
        signs.stop()


def _named(text: str, field: str | None = None, storage: bool = False) -> InputError | StorageError | TrainingError:
    """Rebuild the error that a worker reported."""
    if field is None:
        return TrainingError(text)
    return StorageError(field, text) if storage else InputError(field, text)


def _ends_an_attempt(error: Exception) -> bool:
    """Return whether another process ended or a link hangs, so that a collective failed, or this process's GPU failed.

    New processes can go on in each case; a context of CUDA in which something has failed works no more.
    """
    return isinstance(error, dist.DistError) or context_is_dead(error) or "gloo" in str(error)
