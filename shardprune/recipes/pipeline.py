"""The recipe of `shardprune pipeline`: the recipes of its steps in one file."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from shardprune.errors import InputError
from shardprune.recipes.evaluate import EvaluateRecipe
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.groups import BackendFields, OutputFields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.prune import PruneRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recipes.settings import Settings, checked_section
from shardprune.storage.malformed import shown
from shardprune.storage.output_names import PRUNED, RECOVERED

Step = PruneRecipe | MopRecipe | ExpertsRecipe | RecoverRecipe | EvaluateRecipe
STEPS: dict[str, type[Step]] = {
    recipe.command: recipe for recipe in (PruneRecipe, MopRecipe, ExpertsRecipe, RecoverRecipe, EvaluateRecipe)
}
FIRST = ("prune", "mop", "experts")  # of these a pipeline has one
EACH = "each"  # of the section mop, beside its options


class StepFields(Settings):
    """The sections of a pipeline, in the order of its steps: one for each of `STEPS`."""

    title: ClassVar[str] = "Steps"

    prune: dict[str, Any] | None = Field(None, description="Options of `shardprune prune`")
    mop: dict[str, Any] | None = Field(
        None,
        description="Options of `shardprune mop`, instead of prune; with `each: true` beside them every kept iteration "
        "is recovered and evaluated",
    )
    experts: dict[str, Any] | None = Field(None, description="Options of `shardprune experts`, instead of prune")
    recover: dict[str, Any] | None = Field(None, description="Options of `shardprune recover`")
    evaluate: dict[str, Any] | None = Field(None, description="Options of `shardprune evaluate`")


class PipelineRecipe(StepFields, BackendFields, OutputFields):
    """The recipe of `shardprune pipeline`.

    Fields beside the steps (backend, device, threads, ...) hold for every step that does not override them.
    """

    command: ClassVar[str] = "pipeline"

    model: str = Field(min_length=1, description="Checkpoint: directory, URL or hub name")

    @model_validator(mode="after")
    def _steps_fit(self) -> "PipelineRecipe":
        if sum(getattr(self, step) is not None for step in FIRST) != 1:
            raise InputError("prune", f"give one of the sections {', '.join(FIRST[:-1])} and {FIRST[-1]}")
        if self.recover is None and self.evaluate is None:
            raise InputError("recover", "missing; give a section recover, evaluate, or both")
        self._check_each()
        for step in self.steps:
            self.section(step)
        recovery = self.section("recover") if self.recover is not None else None
        pruning = self.section("prune") if self.prune is not None else None
        zeroes = isinstance(pruning, PruneRecipe) and pruning.zeroes
        if isinstance(recovery, RecoverRecipe) and recovery.keep_sparsity and not zeroes:
            raise InputError("recover.keep_sparsity", "the step before leaves no zeros to keep")
        return self

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps that the recipe has, in order."""
        return tuple(name for name in STEPS if getattr(self, name) is not None)

    def _check_each(self) -> None:
        each = (self.mop or {}).get(EACH, False)
        if not isinstance(each, bool):
            raise InputError(f"mop.{EACH}", f"{shown(each)} is not allowed; use true or false")
        if each and (self.mop or {}).get("keep") is None:
            raise InputError(f"mop.{EACH}", "True has no effect without keep")
        if each and self.recover is None:
            raise InputError(f"mop.{EACH}", "True has no effect without a section recover")
        if each and self.recover and self.recover.get("push") is not None:
            raise InputError("recover.push", f"{shown(self.recover['push'])} is one repository for several models")

    @property
    def each(self) -> bool:
        """Whether later steps are carried out for every iteration that mop keeps, too."""
        return bool((self.mop or {}).get(EACH))

    def section(self, step: str, kept: str | None = None) -> Step:
        """Return the recipe of one step; the pipeline says its model and output.

        Args:
            kept: folder of the iteration of mop for which it is carried out; None: for the model at the end.

        Raises:
            InputError: names the step and the field that is wrong.
        """
        given = dict(getattr(self, step))
        if step == "mop":
            given.pop(EACH, None)
        names = {*BackendFields.model_fields, "report"} & self.model_fields_set
        shared = {name: getattr(self, name) for name in names}
        for name in ("model", "out", "resume"):
            if name in given:
                raise InputError(f"{step}.{name}", "stands beside the steps, not within one")
        below, beside = (f"/{kept}", f"-{kept}") if kept else ("", "")
        pruned, recovered = f"{self.out}/{PRUNED}{below}", f"{self.out}/{RECOVERED}{beside}"
        places = {
            **{first: {"model": self.model, "out": f"{self.out}/{PRUNED}"} for first in FIRST},
            "recover": {"model": pruned, "out": recovered},
            "evaluate": {"model": pruned if self.recover is None else recovered},
        }
        if kept and step == "recover" and given.get("state") is not None:
            given["state"] = f"{given['state']}/{kept}"  # of its own: it is removed when that training is done
        return checked_section(step, STEPS[step], {**shared, **given, **places[step]})
