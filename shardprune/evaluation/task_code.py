"""Code in the tasks of a directory: none of it is run unless the user says that it may be.

A task is a YAML file, but lm-eval runs code for three things in it: `!function` imports Python, a metric that lm-eval
lacks is a script that the `evaluate` library downloads, and templates are Jinja's, from whose objects a template can
reach any module. While the tasks of a directory are loaded and evaluated, the first two are refused for them, and
templates are rendered in Jinja's sandbox. lm-eval's own tasks, which were installed with it, need none of that.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.api.task as task_module
import lm_eval.tasks._yaml_loader as yaml_loader
import lm_eval.utils
import yaml
from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from shardprune.errors import InputError, first_line
from shardprune.recipes.evaluate import TaskFields

OWN = Path(lm_eval.__file__).parent  # whose Python was installed with lm-eval
ALLOW = "--allow-task-code runs it, if you trust the directory"


class CodeRefused(InputError):
    """A task needs code that may not be run."""


@contextmanager
def without_task_code(recipe: TaskFields) -> Iterator[None]:
    """Keep tasks from running code of theirs for the duration of the block, unless the recipe allows it.

    Raises:
        CodeRefused: in the block, where a task names code.
    """
    if recipe.allow_task_code or not recipe.tasks_dir:
        yield
        return
    with ExitStack() as replaced:
        for module, name, value in (
            (lm_eval.utils, "env", _sandboxed(lm_eval.utils.env)),
            (yaml_loader, "_Base", getattr(yaml, "CSafeLoader", yaml.SafeLoader)),
            (yaml_loader, "_import_func_in_yml", _import_of_lm_eval(yaml_loader._import_func_in_yml)),
            (task_module, "get_metric", _metric_of_lm_eval(task_module.get_metric)),
        ):
            replaced.enter_context(_replaced(module, name, value))
        try:
            yield
        except SecurityError as error:
            reason = f"a template of a task leaves Jinja's sandbox: {first_line(error)}"
            raise CodeRefused("tasks", f"{reason}; {ALLOW}") from error


@contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    own = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, own)


def _sandboxed(own: Environment) -> Environment:
    """Return a sandboxed environment with the settings and filters of lm-eval's own; its templates may fill lists that
    they have made."""
    sandbox = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    sandbox.filters.update({name: own.filters[name] for name in own.filters.keys() - sandbox.filters.keys()})
    return sandbox


def _import_of_lm_eval(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that carries out `!function`, for files of lm-eval alone."""

    def load_own(name: str, folder: Path) -> Any:
        if OWN not in folder.resolve().parents:
            problem = f"a task in {str(folder)!r} names the Python function {name!r}, which is not run; {ALLOW}"
            raise CodeRefused("tasks_dir", problem)
        return load(name, folder)

    return load_own


def _metric_of_lm_eval(get: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that finds a metric, for those of lm-eval alone."""

    def get_own(name: str, script: bool = False) -> Any:
        from lm_eval.api.registry import metric_registry

        if script or name not in metric_registry:
            problem = f"metric {name!r} is none of lm-eval's but a script of the hub, which is not run; {ALLOW}"
            raise CodeRefused("tasks_dir", problem)
        return get(name)

    return get_own
