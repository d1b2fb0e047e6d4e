"""The story of `shardprune pipeline`: a model is pruned, healed and judged as one job.

Every step that makes a model has a folder of its own and resumes as it does alone.
"""

from contextlib import closing
from typing import Any

from pydantic import BaseModel

from shardprune.cluster.backends import backend_of
from shardprune.commands.evaluate import check_evaluation
from shardprune.commands.prepare import prepare
from shardprune.commands.prepare_mop import prepare_mop
from shardprune.commands.prepare_recovery import open_inputs
from shardprune.commands.prune import prepare_first
from shardprune.errors import InputError, without_credentials
from shardprune.model.checkpoint import Checkpoint
from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.pipeline import PipelineRecipe
from shardprune.recipes.prune import PruneRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import EvaluationResult, Result
from shardprune.storage.folder import output_folder
from shardprune.storage.journal import lasting_names
from shardprune.storage.json_file import fitting
from shardprune.storage.locations import absolute
from shardprune.storage.malformed import located
from shardprune.storage.output_names import RESULT
from shardprune.storage.relative_paths import absolute_paths, relative_paths
from shardprune.storage.retrying import preflight

STATE = "pipeline.json"


def pipeline(recipe: PipelineRecipe, reporter: Reporter | None = None) -> dict[str, Result | EvaluationResult]:
    """Carry out all steps of a recipe, of which those that are finished do nothing; the results of all but an
    evaluation that was done before.

    Raises:
        InputError: something in a step cannot work; no step has started then.
        SolverError, StorageError, TrainingError, WorkerLost: as the steps raise them.
    """
    reporter = reporter or Reporter()
    recipe = recipe.model_copy(update={"out": absolute(recipe.out)})
    with preflight():
        progress = _Progress(recipe)
        progress.folder.check_writable()
        _check_ahead(recipe, reporter)
    progress.save()
    results = {}
    for step in recipe.steps:
        section = recipe.section(step)
        if isinstance(section, EvaluateRecipe) and progress.evaluated == _asked(section):
            reporter.say(f"{step} is done already")
            continue
        reporter.say(f"step {step}")
        results[step] = COMMANDS[step].story(section, reporter)
        if isinstance(section, EvaluateRecipe):
            progress.evaluated = _asked(section)
            progress.save()
    if recipe.report:
        leave_report(recipe.out, reporter, new="evaluate" in results)
    return results


def _check_ahead(recipe: PipelineRecipe, reporter: Reporter) -> None:
    """Open what the steps read, as far as that does not wait for the steps before them.

    Raises:
        InputError: names the step and the field.
    """
    Checkpoint(recipe.model)
    for step in recipe.steps:
        section = recipe.section(step)
        try:
            with closing(backend_of(section)) as backend:
                unpruned = section.model_copy(update={"model": recipe.model})
                if isinstance(unpruned, PruneRecipe):
                    prepare_first(unpruned, backend)
                if isinstance(unpruned, MopRecipe):
                    prepare_mop(unpruned, backend)
                if isinstance(unpruned, ExpertsRecipe):
                    prepare(unpruned, backend)
                if isinstance(unpruned, RecoverRecipe):
                    open_inputs(unpruned, backend)
                if isinstance(unpruned, EvaluateRecipe):
                    check_evaluation(unpruned, backend, reporter)
        except InputError as error:
            raise InputError(f"{step}.{error.field}", error.problem) from error


class _PipelineFile(BaseModel):
    """The content of `pipeline.json`."""

    model: str
    steps: list[str]
    evaluated: dict[str, Any] | None
    recipe: dict[str, Any]


class _Progress:
    """The progress of a pipeline in its output: its recipe, and the evaluation that was done. The other steps know
    themselves whether they are finished, and whether they are the same as before.

    Raises:
        InputError: it holds something else, or may not be resumed.
    """

    def __init__(self, recipe: PipelineRecipe) -> None:
        self.folder = output_folder(recipe.out)
        self.recipe = recipe
        self.evaluated: dict[str, Any] | None = None
        names = lasting_names(self.folder)
        if not names:
            return
        if STATE not in names:
            held = "a run" if RESULT in names else "something else"
            raise InputError("out", f"{recipe.out} is not empty and holds {held}; choose an empty directory")
        with located("out", f"{recipe.out}/{STATE}"):
            state = fitting(absolute_paths(self.folder.read_json(STATE), self.folder.url), _PipelineFile)
        if (state.model, state.steps) != (self._model, list(recipe.steps)):
            raise InputError("out", f"{recipe.out} holds another pipeline; choose an empty directory")
        if not recipe.resume:
            raise InputError("out", f"{recipe.out} holds this pipeline already; resume it or choose an empty directory")
        self.evaluated = state.evaluated

    @property
    def _model(self) -> str:
        return without_credentials(self.recipe.model)

    def save(self) -> None:
        """Record what is known, and with the first call claim the directory."""
        state = _PipelineFile(
            model=self._model,
            steps=list(self.recipe.steps),
            evaluated=self.evaluated,
            recipe=self.recipe.record() | {step: self.recipe.section(step).record() for step in self.recipe.steps},
        )
        self.folder.write_json(STATE, relative_paths(state.model_dump(mode="json"), self.folder.url))


def _asked(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Return the fields of an evaluation that decide what it measures."""
    fields = {name for group in recipe.shaping for name in group.model_fields}
    return {name: value for name, value in recipe.record().items() if name in fields}
