"""The story of `shardprune pipeline`: a model is pruned, healed and judged as one job.

Every step has a folder of its own and resumes as it does alone; `pipeline.json` says which of them are done.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

from shardprune.checkpoint import Checkpoint
from shardprune.cluster.backends import backend_of
from shardprune.errors import InputError
from shardprune.evaluation.recipe import EvaluateRecipe
from shardprune.evaluation.run import check_evaluation, evaluate
from shardprune.fine_tuning import recover
from shardprune.journal import RESULT
from shardprune.pipeline_recipe import PipelineRecipe
from shardprune.progress import Output
from shardprune.recover_recipe import RecoverRecipe
from shardprune.recovery_plan import open_inputs
from shardprune.result import EvaluationResult, Result
from shardprune.run import prune
from shardprune.search import mop
from shardprune.setting_groups import Machines
from shardprune.storage import PARTIAL, Folder, absolute, first_line

STATE = "pipeline.json"
RUNS: dict[str, Callable[[Any, Output], Result | EvaluationResult]] = {
    "prune": prune,
    "mop": mop,
    "recover": recover,
    "evaluate": evaluate,
}


def pipeline(recipe: PipelineRecipe, output: Output | None = None) -> dict[str, Result | EvaluationResult]:
    """Carry out all steps of a recipe that are not yet done; the results of those that were carried out now.

    Raises:
        InputError: something in a step cannot work; no step has started then.
        SolverError, WorkerLost: as the steps raise them.
    """
    output = output or Output()
    recipe = recipe.model_copy(update={"out": absolute(recipe.out)})
    progress = _Progress(recipe)
    _check_ahead(recipe, output)
    results = {}
    for step in recipe.steps:
        if step in progress.done:
            output.say(f"{step} is done already")
            continue
        progress.save()
        output.say(f"step {step}")
        results[step] = RUNS[step](recipe.section(step), output)
        progress.finish(step)
    return results


def _check_ahead(recipe: PipelineRecipe, output: Output) -> None:
    """Open what later steps read, as far as that does not wait for the steps before them.

    Raises:
        InputError: names the step and the field.
    """
    Checkpoint(recipe.model)
    for step in recipe.steps:
        section = recipe.section(step)
        try:
            with closing(backend_of(section.backend, section.address)) as backend:
                unpruned = section.model_copy(update={"model": recipe.model})
                if isinstance(unpruned, RecoverRecipe):
                    open_inputs(unpruned, backend)
                if isinstance(unpruned, EvaluateRecipe):
                    check_evaluation(unpruned, backend, output)
        except InputError as error:
            raise InputError(f"{step}.{error.field}", error.problem) from error


class _Progress:
    """What an output directory says about a pipeline.

    Raises:
        InputError: it holds something else, or may not be resumed.
    """

    def __init__(self, recipe: PipelineRecipe) -> None:
        self.folder = Folder(recipe.out, "out")
        self.recipe = recipe
        self.fingerprint = _fingerprint(recipe)
        self.done: list[str] = []
        names = [name for name in self.folder.names() if not PARTIAL.fullmatch(name)]
        if not names:
            return
        if STATE not in names:
            held = "a run" if RESULT in names else "something else"
            raise InputError("out", f"{recipe.out} is not empty and holds {held}; choose an empty directory")
        state = self.folder.read_json(STATE)
        if state.get("fingerprint") != self.fingerprint:
            raise InputError("out", f"{recipe.out} holds another pipeline; choose an empty directory")
        if not recipe.resume:
            raise InputError("out", f"{recipe.out} holds this pipeline already; resume it or choose an empty directory")
        self.done = state["done"]

    def finish(self, step: str) -> None:
        self.done.append(step)
        self.save()

    def save(self) -> None:
        """Record what is done, and with the first call claim the directory."""
        state = {"fingerprint": self.fingerprint, "recipe": _record(self.recipe), "done": self.done}
        try:
            self.folder.write_json(STATE, state)
        except OSError as error:
            raise InputError("out", f"{self.folder.url} cannot be written: {first_line(error)}") from error


def _fingerprint(recipe: PipelineRecipe) -> str:
    """A hash of what the steps do, wherever they do it."""
    machines = set(Machines.model_fields)
    content = {
        step: {name: value for name, value in recipe.section(step).record().items() if name not in machines}
        for step in recipe.steps
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record(recipe: PipelineRecipe) -> dict[str, Any]:
    """The recipe for a file that others read."""
    steps = {step: recipe.section(step).record() for step in recipe.steps}
    return {**recipe.record(), **steps}
