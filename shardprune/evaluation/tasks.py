"""lm-eval's tasks: lookup by name, loading of their data, and evaluation."""

import difflib
import logging
import random
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from jinja2.exceptions import SecurityError
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from shardprune.errors import InputError, StorageError, first_line
from shardprune.evaluation.task_code import CodeRefused, without_task_code
from shardprune.recipes.evaluate import TaskFields
from shardprune.report.result import Metric, TaskResult
from shardprune.storage.data_files import check_data_files
from shardprune.storage.malformed import shown
from shardprune.storage.yaml_file import check_depth

SETS = {  # tasks of the papers on pruning
    "zeroshot": ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "boolq", "openbookqa", "rte")
}
NAMES = {"task", "group", "tag"}  # fields of a task's YAML
Opened = dict[str, list[Task | Group]]  # by requested name; a tag names several tasks
SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")  # output types that log-likelihoods suffice for


def load_tasks(recipe: TaskFields) -> list[Task | Group]:
    """Load the tasks and groups of tasks that a recipe names, with their data.

    lm-eval's own thousands of tasks are indexed only if the recipe's directory lacks a name.

    Raises:
        InputError: there is no such task or directory, its data cannot be loaded, it names code that may not be run, or
            the engine cannot answer it.
    """
    _seed()  # some tasks shuffle answers while they load
    with _quiet(), without_task_code(recipe):
        opened = _load(recipe)
    sources: dict[str, str] = {}
    for name, items in opened.items():
        for task in _leaves(items):
            _check_answerable(task, recipe.engine)
            if task.task_name in sources:
                twice = f"{task.task_name!r} is asked for twice, in {sources[task.task_name]!r} and {name!r}"
                raise InputError("tasks", twice)
            sources[task.task_name] = name
    return [item for items in opened.values() for item in items]


def evaluate_tasks(lm: LM, tasks: Sequence[Task | Group], recipe: TaskFields) -> dict[str, TaskResult]:
    """Evaluate tasks; return results by the names of tasks, and of groups that aggregate tasks.

    Raises:
        StorageError: a task makes no questions of its data, or no score of the answers.
    """
    # Not `simple_evaluate`, which also collects the machine's and the working directory's git state.
    for task in _leaves(tasks):
        _set_shots(task, recipe.num_fewshot)
    with _quiet(), without_task_code(recipe):
        chosen = TaskManager(include_defaults=False).load(list(tasks))
        try:
            found = lm_eval.evaluate(lm, chosen, limit=recipe.limit, log_samples=False)
        except Exception as error:
            if not _is_of_tasks(error):
                raise
            names = ", ".join(repr(task.task_name) for task in _leaves(tasks))
            raise StorageError("tasks", f"{names} cannot be evaluated: {first_line(error)}") from error
    assert found is not None
    results, leaves = {}, {task.task_name for task in _leaves(tasks)}
    for name, values in found["results"].items():
        if metrics := _metrics(values):
            shots, group = found["n-shot"].get(name) or 0, name not in leaves
            results[name] = TaskResult(metrics=metrics, samples=values["sample_len"], num_fewshot=shots, group=group)
    return results


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("shardprune.")


def _is_of_tasks(error: Exception) -> bool:
    """Return whether an error comes from lm-eval's work on tasks and their data, and not from the model's answers."""
    own = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__) if _is_ours(frame)]
    return own[-1] is evaluate_tasks.__code__


def _metrics(values: dict[str, Any]) -> dict[str, Metric]:
    """Parse the metrics of a task from lm-eval's keys such as `acc,none` and `acc_stderr,none`."""
    metrics = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = values.get(f"{name}_stderr,{filtered}")
            known = stderr if isinstance(stderr, int | float) else None
            metrics[name if filtered == "none" else key] = Metric(value=value, stderr=known)
    return metrics


def _load(recipe: TaskFields) -> Opened:
    """Load the named tasks, from the recipe's directory first, then from lm-eval's."""
    own = _own_tasks(recipe.tasks_dir) if recipe.tasks_dir else None
    wanted = [part for name in recipe.tasks for part in (SETS.get(name, (name,)))]
    if own and all(own.match_tasks([name]) for name in wanted):
        try:
            return _open(own, wanted)
        except CodeRefused:
            raise
        except InputError:
            if not any(set(own.match_tasks([name])) & set(own.all_groups) for name in wanted):
                raise  # otherwise a group may contain lm-eval's own tasks: try again with those
    return _open(TaskManager(include_path=recipe.tasks_dir), wanted)


def _own_tasks(folder: str) -> TaskManager:
    """Index the tasks of a directory.

    Raises:
        InputError: it does not exist, or holds a YAML file that lm-eval cannot read and would skip silently.
    """
    if not Path(folder).is_dir():
        raise InputError("tasks_dir", f"{folder!r} is no directory")
    for file in sorted(Path(folder).rglob("*.yaml")):
        try:
            _check_included(file, set())
            values = load_yaml(file, resolve_func=False)
            _check_names(values)
            check_data_files(str(values.get("dataset_path")), values.get("dataset_kwargs"))
        except Exception as error:  # errors of the YAML parser, of included files, and of lm-eval
            reason = " ".join(str(error).split())
            raise InputError("tasks_dir", f"{str(file)!r} cannot be read by lm-eval: {reason}") from error
    return TaskManager(include_path=folder, include_defaults=False)


def _check_included(file: Path, seen: set[Path]) -> None:
    """Check that a task's YAML and what it includes are files, as a pipe would be waited for, and not too deep."""
    if not file.is_file():
        raise ValueError(f"{str(file)!r} is no file")
    check_depth(file.read_bytes())
    included = load_yaml(file, resolve_func=False, recursive=False).get("include", [])
    for name in included if isinstance(included, list) else [included]:
        if (inner := file.parent / name) not in seen:
            _check_included(inner, seen | {inner})


def _check_names(values: dict[str, Any]) -> None:
    """Check the names that lm-eval sorts tasks by before it looks at anything else."""
    for field in NAMES & values.keys():
        entries = values[field] if isinstance(values[field], list) else [values[field]]
        if not all(isinstance(entry, str | dict) for entry in entries):
            raise ValueError(f"{field} is {shown(values[field])}; use a name or a list of names")


def _open(manager: TaskManager, wanted: Sequence[str]) -> Opened:
    opened: Opened = {}
    names = dict.fromkeys(match for name in wanted for match in _matches(manager, name))
    for name in names:
        try:
            found = manager.load([name])
        except (CodeRefused, SecurityError):
            raise
        except Exception as error:  # a data set's or a task's own code can raise anything
            raise InputError("tasks", f"{name!r} cannot be loaded: {first_line(_root(error))}") from error
        opened[name] = [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]
    return opened


def _root(error: BaseException) -> BaseException:
    """Return the error that others were raised for: what a data set raises says only that it has none."""
    return _root(error.__cause__) if error.__cause__ else error


def _matches(manager: TaskManager, name: str) -> list[str]:
    """Return the names that match a name or pattern.

    Raises:
        InputError: there are none.
    """
    matches = manager.match_tasks([name])
    if not matches:
        near = difflib.get_close_matches(name, [*manager.all_tasks, *SETS], n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists those of the harness"
        raise InputError("tasks", f"{name!r} is no task; {hint}")
    return matches


def writes(tasks: Sequence[Task | Group]) -> bool:
    """Return whether the model is to write text in any of the tasks."""
    return any(task.OUTPUT_TYPE not in SCORED for task in _leaves(tasks))


def showing(tasks: Sequence[Task | Group]) -> list[str]:
    """Return the names of the tasks that show images."""
    return [task.task_name for task in _leaves(tasks) if getattr(task, "MULTIMODAL", False)]


def _leaves(items: Sequence[Task | Group]) -> list[Task]:
    return [task for item in items for task in (item.get_all_tasks() if isinstance(item, Group) else [item])]


def _set_shots(task: Task, shots: int | None) -> None:
    """Set the number of examples before each question as lm-eval's command does: 0 if the task names none."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _seed() -> None:
    """Seed all random generators as lm-eval's command does."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _check_answerable(task: Task, engine: str) -> None:
    """Check that an engine can answer a task.

    Raises:
        InputError: the task needs more than the engine does.
    """
    name = task.task_name
    if getattr(task, "MULTIMODAL", False):
        _check_images(task, engine)
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError("tasks", f"{name!r} runs code that the model writes, which is not done here; use lm_eval")
    if engine == "shards" and task.OUTPUT_TYPE not in SCORED:
        raise InputError("tasks", f"{name!r} lets the model write text, which shards do not do; use --engine hf")


def _check_images(task: Task, engine: str) -> None:
    """Check that an engine can answer a task that shows more than text.

    Raises:
        InputError: it cannot.
    """
    name = task.task_name
    if task.get_config("doc_to_audio"):
        raise InputError("tasks", f"{name!r} plays sounds; use a task of texts and images")
    if engine == "shards":
        raise InputError("tasks", f"{name!r} shows images, which shards do not see; use --engine hf")
    if task.OUTPUT_TYPE != "generate_until":
        wanted = "use one of output type generate_until, or --answers"
        raise InputError("tasks", f"{name!r} scores given answers about images, which lm-eval does not do; {wanted}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what lm-eval and its data sets print: what goes wrong is raised, too. Bars are for terminals."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels, bars = [logger.level for logger in loggers], datasets.utils.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    shown = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(shown, disable=None)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
