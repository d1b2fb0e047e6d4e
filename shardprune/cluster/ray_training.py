"""A training's processes as Ray Train's workers, which find each other through torch's process group.

Ray Train is not asked to restart anything: the driver owns recovery, here as everywhere, so that a training may go on
with fewer workers. Checkpoints go to shared storage without Ray: what is reported to Ray just before a worker dies
may be lost.
"""

from typing import Any

import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from shardprune.errors import InputError, StorageError, TrainingError, WorkerLost, first_line
from shardprune.recovery.spec import TrainingSpec
from shardprune.recovery.worker import train_worker
from shardprune.storage.folder import Folder

# For a process that waits while another converts a large checkpoint; that one has died Ray says much sooner.
PATIENCE_SECONDS = 4 * 3600


class Reports:
    """What the workers of one attempt leave in the training's directory: what they took, or what went wrong.

    A worker that dies leaves nothing, and neither do those whose collectives end because of that.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        assert spec.recipe.state is not None
        self._folder = Folder(spec.recipe.state, "state")

    def clear(self) -> None:
        for name in self._names():
            self._folder.remove(name)

    def write(self, rank: int, report: dict[str, Any]) -> None:
        self._folder.write_json(f"worker-{rank:05d}.json", report)

    def read(self) -> list[dict[str, Any]]:
        """In the order of the workers."""
        return [self._folder.read_json(name) for name in self._names()]

    def _names(self) -> list[str]:
        return [name for name in self._folder.names() if name.startswith("worker-")]


def train_on_ray(spec: TrainingSpec, workers: int, cpus: int) -> list[dict[str, Any]]:
    """Carry out a training on the connected cluster, with so many CPUs for each worker; what each worker took.

    Raises:
        InputError: the cluster does not free what the workers need, or as `train_worker`.
        StorageError, TrainingError: as `train_worker`.
        WorkerLost: a worker or its node died.
    """
    gpu = spec.recipe.device == "cuda"
    reports = Reports(spec)
    reports.clear()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=PATIENCE_SECONDS),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(
            name="ray",
            storage_path=spec.recipe.state,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        for wrong in (report["error"] for report in reports.read() if "error" in report):
            if wrong is None:
                raise
            raise _named(**wrong) from error
        if isinstance(error, ControllerError) and "Timeout" in type(error.controller_failure).__name__:
            wanted = f"{workers} x {cpus} CPUs" + (" and a GPU" if gpu else "")
            raise InputError("address", f"the cluster did not free {wanted} in time") from error
        raise WorkerLost("one of the training's processes died") from error
    return reports.read()


def _work(config: dict[str, Any]) -> None:
    """What runs in every worker."""
    spec: TrainingSpec = config["spec"]
    reports, rank = Reports(spec), get_context().get_world_rank()
    try:
        reports.write(rank, train_worker(spec))
    except (InputError, StorageError) as error:
        told = {"text": error.problem, "field": error.field, "storage": isinstance(error, StorageError)}
        reports.write(rank, {"error": told})
        raise
    except TrainingError as error:
        reports.write(rank, {"error": {"text": first_line(error)}})
        raise
    except Exception as error:
        if not _others_are_gone(error):
            reports.write(rank, {"error": None})
        raise


def _named(text: str, field: str | None = None, storage: bool = False) -> InputError | StorageError | TrainingError:
    """The error that a worker raised."""
    if field is None:
        return TrainingError(text)
    return StorageError(field, text) if storage else InputError(field, text)


def _others_are_gone(error: Exception) -> bool:
    """Whether a collective ended because another process did."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
