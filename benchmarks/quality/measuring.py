"""The runs behind the rows: one pruning and one measurement of perplexity each, in this process."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from benchmarks.quality.cases import Case, Texts
from benchmarks.quality.costs import CpuSeconds, method_seconds, passes_of, training_passes
from benchmarks.quality.pairs import accuracies
from benchmarks.quality.rows import amount
from benchmarks.quality.store import Measured, Place, Store
from shardprune import EvaluateRecipe, Recipe, evaluate, prune
from shardprune.errors import InputError
from shardprune.report.progress import Reporter
from shardprune.solvers.improving import LEAST_SAMPLES

EXACT = 5e-5  # of a sparsity that is shown with four digits; a small model may miss it by a weight a projection


class Measurer:
    """Rows of one case, taken from the store where they are there.

    Args:
        workers: fields of every recipe that say on what it is carried out.
        text: `samples`, `seqlen` and `seed` of every recipe.
        windows: of the text that perplexity is measured on.
        pairs: a folder of pairs of sentences, on which every model's accuracy is measured, too.
    """

    def __init__(
        self,
        case: Case,
        store: Store,
        workers: dict[str, Any],
        text: dict[str, Any],
        windows: int,
        pairs: str | None = None,
    ) -> None:
        self.case, self.store, self._pairs = case, store, pairs
        self._workers, self._shared = workers, {**workers, **text}
        self._folder = store.folder / case.name
        self.texts = Texts(case, self._folder, self._shared, windows)

    # -- what decides a row -------------------------------------------------------------------------------------

    def recipe(self, text: str, setting: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a row's recipe, but for the output."""
        own = {"targets": "own"}  # also on text of the model's own, where `auto` would take the stream
        places = {"model": self.case.model, "calibration": self.texts.source(text)}
        return {**self._shared, **amount(setting), **own, **fields, **places}

    def refusal(self, recipe: dict[str, Any]) -> str | None:
        """Return why this version carries out no such recipe; None where it does."""
        try:
            _checked(recipe)
        except InputError as error:
            return str(error).split(";")[0]
        return None

    def decided(self, text: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return all that decides a row, without places on this machine and fields with their defaults: rows that are
        measured elsewhere count, and those from before a field was new."""
        shape = _checked(recipe).shape()
        fields = {name: value for name, value in shape.items() if value != _default(name)}
        return {
            "recipe": fields,
            "text": self.texts.decided(text),
            **self._measured_decided,
        }

    @property
    def _measured_decided(self) -> dict[str, Any]:
        pairs = {"pairs": Path(self._pairs).name} if self._pairs else {}
        on = {name: self._workers[name] for name in ("device", "dtype")}
        return {"measured on": self.texts.measured_decided(), **pairs, **on}

    # -- rows ---------------------------------------------------------------------------------------------------

    def found_dense(self) -> Measured | None:
        """Return what was measured of the model as it is, if anything was."""
        return self.store.find((self.case.name,), self._measured_decided)

    def measure_dense(self) -> None:
        """Measure the model as it is, unless it was measured."""
        if self.found_dense() is None:
            with _Folder(self._folder) as out:
                value = self._perplexity(self.case.model, out=str(out))
            measured = Measured(value, 0.0, 0.0, 0.0, self._accuracies(self.case.model))
            self.store.keep((self.case.name,), self._measured_decided, measured)

    def found(self, text: str, setting: str, recipe: dict[str, Any]) -> Measured | None:
        """Return the row of a recipe, if it was measured."""
        return self.store.find(self._place(text, setting), self.decided(text, recipe))

    def measure(self, text: str, setting: str, recipe: dict[str, Any]) -> Measured:
        """Measure the row of a recipe."""
        reporter = Reporter(quiet=True)
        reporter.events = clock = CpuSeconds()
        with _Folder(self._folder) as out:
            result = prune(Recipe.checked({**recipe, "out": str(out), "report": False}), reporter)
            assert result.sparsity is not None
            achieved, target = result.sparsity.achieved, result.sparsity.target
            allowed = max(EXACT, len(result.sparsity.projections) / result.model.parameters_before)
            assert ":" in setting or abs(achieved - target) < allowed, f"{setting}: {achieved}, not {target}"
            settings = result.recipe
            passes = passes_of(out, len(result.sparsity.layers), settings["samples"], settings["wave"])
            passes += training_passes(settings.get("reconstruct") or 0, settings["samples"], settings["seqlen"])
            here = settings["backend"] == "local" and settings["device"] == "cpu"
            seconds = method_seconds(clock.seconds if here else result.seconds)
            measured = Measured(self._perplexity(str(out)), seconds, passes, achieved, self._accuracies(str(out)))
        self.store.keep(self._place(text, setting), self.decided(text, recipe), measured)
        return measured

    def warm_up(self) -> None:
        """Load what a GPU loads with the first call of everything, which is not to count as seconds of a row."""
        samples = min(self._shared["samples"], LEAST_SAMPLES)
        trained = {"reconstruct": 1} if samples == LEAST_SAMPLES else {}
        every = {"method": "alps", "sparsity": 0.5, "allocation": "fisher", "samples": samples, **trained}
        fields = {**self._shared, **every, "model": self.case.model, "report": False}
        with _Folder(self._folder) as out:
            recipe = {**fields, "calibration": self.texts.source(next(iter(self.case.texts))), "out": str(out)}
            prune(Recipe.checked(recipe), Reporter(quiet=True))
            self._perplexity(str(out))

    # -- inside -------------------------------------------------------------------------------------------------

    def _place(self, text: str, setting: str) -> Place:
        return self.case.name, text, setting

    def _accuracies(self, model: str) -> dict[str, float]:
        return accuracies(model, self._pairs, self._workers) if self._pairs else {}

    def _perplexity(self, model: str, **fields: Any) -> float:
        seqlen = self._shared["seqlen"]
        recipe = {**self._workers, "model": model, "perplexity": [self.texts.measured], "seqlen": seqlen, **fields}
        done = evaluate(EvaluateRecipe.checked({**recipe, "report": False}), Reporter(quiet=True))
        (measured,) = done.evaluation.perplexity.values()
        assert measured.value is not None, f"{model}: perplexity is not finite"
        return measured.value


def _default(name: str) -> Any:
    return Recipe.model_fields[name].default


def _checked(recipe: dict[str, Any]) -> Recipe:
    return Recipe.checked({**recipe, "out": "nowhere"})


class _Folder:
    """A folder of this process for one output at a time. What processes that have ended left there is removed."""

    def __init__(self, parent: Path) -> None:
        self._parent, self._own = parent, parent / f"run-{os.getpid()}"

    def __enter__(self) -> Path:
        for folder in self._parent.glob("run-*"):
            if folder == self._own or not psutil.pid_exists(int(folder.name.removeprefix("run-"))):
                shutil.rmtree(folder, ignore_errors=True)
        return self._own

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._own, ignore_errors=True)
