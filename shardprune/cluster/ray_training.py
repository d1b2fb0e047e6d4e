"""A training's processes as Ray Train's workers, which find each other through torch's process group.

Ray Train is not asked to restart them: the driver owns recovery, here as everywhere, so that a training may go on
with fewer workers. Checkpoints go to shared storage without Ray: what is reported to Ray just before a worker dies
may be lost.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from shardprune.errors import InputError, WorkerLost
from shardprune.recovery.process import take_part
from shardprune.recovery.spec import TrainingSpec

# For a process that waits while another converts a large checkpoint; that one has died Ray says much sooner.
PATIENCE_SECONDS = 4 * 3600


@dataclass(frozen=True)
class Reports:
    """What the workers of one attempt leave in the training's directory: what they took, or what went wrong.

    A worker that dies leaves nothing, and neither do those whose collectives end because of that.
    """

    directory: Path

    def clear(self) -> None:
        for file in self.directory.glob("worker-*.json"):
            file.unlink()

    def write(self, rank: int, report: dict[str, Any]) -> None:
        (self.directory / f"worker-{rank}.json").write_text(json.dumps(report))

    def read(self) -> list[dict[str, Any]]:
        """In the order of the workers."""
        files = self.directory.glob("worker-*.json")
        return [json.loads(file.read_text()) for file in sorted(files, key=lambda file: int(file.stem.split("-")[1]))]


def train_on_ray(spec: TrainingSpec, workers: int, cpus: int) -> list[dict[str, Any]]:
    """Carry out a training on the connected cluster, with so many CPUs for each worker; what each worker took.

    Raises:
        InputError: what the driver checked has gone since.
        WorkerLost: a worker or its node died.
    """
    recipe = spec.recipe
    assert recipe.state is not None
    gpu = recipe.device == "cuda"
    reports = Reports(Path(recipe.state))
    reports.clear()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=PATIENCE_SECONDS),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": cpus}),
        run_config=RunConfig(name="ray", storage_path=recipe.state, failure_config=FailureConfig(max_failures=0)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        wrong = [report["error"] for report in reports.read() if "error" in report]
        for field, problem in (entry for entry in wrong if entry):
            raise InputError(field, problem) from error
        if wrong:
            raise
        raise WorkerLost("one of the training's processes died") from error
    return reports.read()


def _work(config: dict[str, Any]) -> None:
    """What runs in every worker."""
    spec: TrainingSpec = config["spec"]
    assert spec.recipe.state is not None
    reports, rank = Reports(Path(spec.recipe.state)), get_context().get_world_rank()
    try:
        reports.write(rank, take_part(spec))
    except InputError as error:
        reports.write(rank, {"error": [error.field, error.problem]})
        raise
    except Exception as error:
        if not _others_are_gone(error):
            reports.write(rank, {"error": None})
        raise


def _others_are_gone(error: Exception) -> bool:
    """Whether a collective ended because another process did."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
