"""Trackers of experiments, which get the steps of a training while it runs: TensorBoard, W&B or MLflow.

Each is opened where the driver runs and takes its settings (server, key, folder, offline mode) from its own environment
variables. A training that goes on goes on in the same run of the tracker.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, Protocol

from shardprune.errors import InputError, first_line
from shardprune.storage.folder import Folder

KEY = "shardprune.run"  # tag of an MLflow run: the training that it shows


class Tracker(Protocol):
    """A run of a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_tracker(track: str, out: str) -> None:
    """Check, as far as that opens nothing, that the tracker of a training can be opened.

    Raises:
        InputError: TensorBoard's folder cannot be written.
    """
    kind, _, place = track.partition(":")
    if kind == "tensorboard":
        Folder(_board(place, out), "track").check_writable()


def _board(place: str, out: str) -> str:
    """Return the folder of a run of TensorBoard."""
    return os.path.join(place, _name(out))


def _name(out: str) -> str:
    return os.path.basename(out.rstrip("/"))


def open_tracker(track: str, out: str, fingerprint: str, settings: Mapping[str, Any]) -> Tracker:
    """Open the run of a tracker that shows a training.

    Args:
        track: `tensorboard:DIR`, `wandb:PROJECT` or `mlflow:EXPERIMENT`, as the recipe's field has it.
        out: output of the training, which gives the run its name.
        fingerprint: of the training.
        settings: its recipe.

    Raises:
        InputError: the tracker refuses it, for example because a key is missing.
    """
    kind, _, place = track.partition(":")
    name, key = _name(out), hashlib.sha256(f"{fingerprint} {out}".encode()).hexdigest()[:16]
    try:
        if kind == "tensorboard":
            return _TensorBoard(_board(place, out))
        shown = {field: value for field, value in settings.items() if value is not None}
        return _WandB(place, name, key, shown) if kind == "wandb" else _MLflow(place, name, key, shown)
    except Exception as error:  # each has errors of its own, of files and of the network
        raise InputError("track", f"{track!r} cannot be opened: {first_line(error)}") from error


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(folder)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, name: str, key: str, settings: dict[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", save_code=False)
        self._run = wandb.init(project=project, name=name, id=key, resume="allow", config=settings, settings=quiet)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, experiment: str, name: str, key: str, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([place], filter_string=f"tags.`{KEY}` = '{key}'")
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(place, run_name=name, tags={KEY: key}).info.run_id
        for field, value in settings.items():
            self._client.log_param(self._run, field, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)
