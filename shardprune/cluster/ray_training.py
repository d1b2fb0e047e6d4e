"""A training's processes as Ray Train's workers, which find each other through torch's process group.

Ray Train is not asked to restart them: the driver owns recovery, here as everywhere, so that a training may go on
with fewer workers. Checkpoints go to shared storage without Ray: what is reported to Ray just before a worker dies
may be lost.
"""

import json
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from shardprune.errors import InputError, SolverError, WorkerLost
from shardprune.recovery.spec import TrainingSpec
from shardprune.storage import first_line

USAGE = "usage-{rank}.json"  # what each worker took, in the training's directory


def train_on_ray(spec: TrainingSpec, workers: int) -> list[dict[str, Any]]:
    """Carry out a training on the connected cluster; what each worker took.

    Raises:
        WorkerLost: a worker or its node died.
    """
    recipe = spec.recipe
    assert recipe.state is not None
    assert recipe.threads is not None
    gpu = recipe.device == "cuda"
    trainer = TorchTrainer(
        _take_part,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker={"CPU": 1 if gpu else recipe.threads}
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=recipe.state,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _cause_of(error) from error
    return [json.loads((Path(recipe.state) / USAGE.format(rank=rank)).read_text()) for rank in range(workers)]


def _take_part(config: dict[str, Any]) -> None:
    """What runs in every worker."""
    from ray.train import get_context

    from shardprune.recovery.process import take_part

    spec: TrainingSpec = config["spec"]
    used = take_part(spec)
    assert spec.recipe.state is not None
    (Path(spec.recipe.state) / USAGE.format(rank=get_context().get_world_rank())).write_text(json.dumps(used))


def _cause_of(error: TrainingFailedError) -> Exception:
    """What made a training fail: what a worker raised itself, or that one died, which ends the others' collectives."""
    if isinstance(error, PreemptionError):
        return WorkerLost(first_line(error))
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    if isinstance(error, ControllerError):
        failures = [error.controller_failure]
    ours = [failure for failure in failures if isinstance(failure, InputError | SolverError)]
    lost = [failure for failure in failures if isinstance(failure, RayError)]
    if ours:
        return ours[0]
    if lost:
        return WorkerLost(first_line(lost[0]))
    return error
