"""The command of a recipe, and checks that a job has the nodes and workers for it."""

from collections.abc import Callable
from typing import Any

from shardprune.cluster.slurm.batch import BatchJob
from shardprune.errors import InputError
from shardprune.recipes.commands import RECIPES
from shardprune.recipes.groups import BackendFields, WorkerFields
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.settings import Settings, read_yaml
from shardprune.storage.locations import check_reachable


def command_of(recipe: str, load: Callable[[str], Settings], asked: str | None) -> tuple[str, Settings]:
    """Return the command that a recipe is for, and its settings.

    Args:
        load: returns the settings that the named command makes of the recipe and its overrides; raises InputError.
        asked: the command; None finds it from the recipe's fields.

    Raises:
        InputError: no command can work with the recipe, or several can.
    """
    if asked is not None and asked not in RECIPES:
        raise InputError("command", f"{asked!r} is not allowed; use one of {', '.join(RECIPES)}")
    found, errors = {}, []
    for command in [asked] if asked else _candidates(read_yaml(recipe)):
        try:
            found[command] = load(command)
        except InputError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    if len(found) > 1:
        raise InputError("command", f"has to be said: {recipe!r} is a recipe for {' and for '.join(found)}")
    ((command, settings),) = found.items()
    return command, settings


def _candidates(values: dict[str, Any]) -> list[str]:
    """The commands that know most of a recipe's fields."""
    unknown = {name: len(values.keys() - recipe.model_fields.keys()) for name, recipe in RECIPES.items()}
    return [name for name in unknown if unknown[name] == min(unknown.values())]


def check_fit(settings: Settings, job: BatchJob) -> None:
    """Check a job's nodes before it waits in a queue.

    Raises:
        InputError: the command would not use the job's nodes, or needs more than they have.
    """
    if not isinstance(settings, PipelineRecipe):
        return _check_fit(settings, job)
    for step in settings.steps:
        try:
            _check_fit(settings.section(step), job)
        except InputError as error:
            raise InputError(f"{step}.{error.field}", error.problem) from error
    return None


def _check_fit(settings: Settings, job: BatchJob) -> None:
    assert isinstance(settings, BackendFields)
    if settings.address is not None:
        raise InputError("address", f"{settings.address!r} is not the job's own Ray cluster; leave it out")
    if settings.backend != "ray":
        raise InputError("backend", f"{settings.backend!r} would leave the job's nodes alone; use ray")
    if isinstance(settings, WorkerFields):
        field, workers = "shards" if settings.shards else "replicas", (settings.shards or 1) * (settings.replicas or 1)
    else:
        field, workers = "workers", getattr(settings, "workers", None) or 1
    for name in ("model", "out"):
        if (url := getattr(settings, name, None)) is not None:
            check_reachable(name, url, settings.backend)
    gpu = job.gpus_per_node > 0 and settings.device != "cpu"
    units, each = ("GPUs", job.gpus_per_node) if gpu else ("CPUs", job.cpus_per_node)
    if each is not None and workers > job.nodes * each:
        raise InputError(field, f"{workers} workers need as many {units}; the job asks for {job.nodes} x {each}")
