"""The story of `shardprune pipeline`: a model is pruned, healed and judged as one job.

Every step that makes a model has a folder of its own and resumes as it does alone. After a search
(`mop`) the later steps may be carried out for every iteration that it kept, too.
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
from shardprune.commands.pushing import check_push
from shardprune.errors import InputError, without_credentials
from shardprune.model.checkpoint import Checkpoint
from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.pipeline import EACH, PipelineRecipe
from shardprune.recipes.prune import PruneRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.report.page.place import leave_report
from shardprune.report.progress import Reporter
from shardprune.report.result import EvaluationResult, Result, read_result
from shardprune.storage.folder import output_folder
from shardprune.storage.journal import lasting_names
from shardprune.storage.json_file import fitting
from shardprune.storage.locations import absolute
from shardprune.storage.malformed import Malformed, located
from shardprune.storage.output_names import PIPELINE, RESULT
from shardprune.storage.relative_paths import relative_paths
from shardprune.storage.retrying import preflight


def pipeline(recipe: PipelineRecipe, reporter: Reporter | None = None) -> dict[str, Result | EvaluationResult]:
    """Carry out all steps of a recipe, of which those that are finished do nothing; the results of all but
    evaluations that were done before, by the names of the steps, for a kept iteration with its folder behind it.

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
    first, *later = recipe.steps
    reporter.say(f"step {first}")
    made = COMMANDS[first].story(recipe.section(first), reporter)
    results: dict[str, Result | EvaluationResult] = {first: made}
    for kept in (*_kept(recipe, made), None):
        for step in later:
            section, name = recipe.section(step, kept), f"{step} {kept}" if kept else step
            if isinstance(section, EvaluateRecipe) and progress.is_evaluated(kept, section):
                reporter.say(f"{name} is done already")
                continue
            reporter.say(f"step {name}")
            results[name] = COMMANDS[step].story(section, reporter)
            if isinstance(section, EvaluateRecipe):
                progress.keep(kept, section)
    if recipe.report:
        evaluated = any(isinstance(result, EvaluationResult) for result in results.values())
        leave_report(recipe.out, reporter, new=evaluated)
    return results


def _kept(recipe: PipelineRecipe, made: Result) -> list[str]:
    """Return the folders of the kept iterations for which later steps are carried out: not of the last one where the
    model at the end is the same."""
    path = (made.structure.path if made.structure else None) or []
    trained = path and made.recipe.get("reconstruct")
    return [entry.folder for entry in (path if trained else path[:-1]) if entry.folder] if recipe.each else []


def _check_ahead(recipe: PipelineRecipe, reporter: Reporter) -> None:
    """Open what the steps read, as far as that does not wait for the steps before them.

    Raises:
        InputError: names the step and the field.
    """
    Checkpoint(recipe.model)
    for step in recipe.steps:
        section = recipe.section(step)
        try:
            if not isinstance(section, EvaluateRecipe):
                check_push(section)
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
    evaluated_kept: dict[str, dict[str, Any]] = {}
    recipe: dict[str, Any]


class _Progress:
    """The progress of a pipeline in its output: its recipe, and the evaluations that were done, by the folder of a kept
    iteration, and by None of the model at the end. The other steps know themselves whether they are finished, and
    whether they are the same as before. Paths are compared as the file has them, relative to the output.

    Raises:
        InputError: it holds something else, or may not be resumed.
    """

    def __init__(self, recipe: PipelineRecipe) -> None:
        self.folder = output_folder(recipe.out)
        self.recipe = recipe
        self.evaluated: dict[str | None, dict[str, Any]] = {}
        names = lasting_names(self.folder)
        if not names:
            return
        if PIPELINE not in names:
            held = "a run" if RESULT in names else "something else"
            raise InputError("out", f"{recipe.out} is not empty and holds {held}; choose an empty directory")
        with located("out", f"{recipe.out}/{PIPELINE}"):
            state = fitting(self.folder.read_json(PIPELINE), _PipelineFile)
        if (state.model, state.steps) != (self._stored(self._model), list(recipe.steps)):
            raise InputError("out", f"{recipe.out} holds another pipeline; choose an empty directory")
        if not recipe.resume:
            raise InputError("out", f"{recipe.out} holds this pipeline already; resume it or choose an empty directory")
        self.evaluated.update(state.evaluated_kept)
        if state.evaluated:
            self.evaluated[None] = state.evaluated

    def is_evaluated(self, kept: str | None, section: EvaluateRecipe) -> bool:
        """Return whether an evaluation was done, and of the model that is there: one that was made anew since holds
        none."""
        if self.evaluated.get(kept) != self._stored(_asked(section)):
            return False
        try:
            return bool(read_result(output_folder(section.model)).evaluation)
        except (InputError, Malformed):
            return False

    def keep(self, kept: str | None, section: EvaluateRecipe) -> None:
        """Record that an evaluation was done."""
        self.evaluated[kept] = self._stored(_asked(section))
        self.save()

    def save(self) -> None:
        """Record what is known, and with the first call claim the directory."""
        recipe = self.recipe.record() | {step: self._section(step) for step in self.recipe.steps}
        state = _PipelineFile(
            model=self._stored(self._model),
            steps=list(self.recipe.steps),
            evaluated=self.evaluated.get(None),
            evaluated_kept={kept: asked for kept, asked in self.evaluated.items() if kept is not None},
            recipe=self._stored(recipe),
        )
        self.folder.write_json(PIPELINE, state.model_dump(mode="json"))

    @property
    def _model(self) -> str:
        return without_credentials(self.recipe.model)

    def _stored(self, content: Any) -> Any:
        """Return JSON content as the file has it."""
        return relative_paths(content, self.folder.url)

    def _section(self, step: str) -> dict[str, Any]:
        """Return the fields of a step, and what a section says beside them."""
        fields = self.recipe.section(step).record()
        return fields | ({EACH: True} if step == "mop" and self.recipe.each else {})


def _asked(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Return the fields of an evaluation that decide what it measures."""
    fields = {name for group in recipe.shaping for name in group.model_fields}
    return {name: value for name, value in recipe.record().items() if name in fields}
