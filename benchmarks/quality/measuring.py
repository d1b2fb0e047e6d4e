"""The runs behind the rows: one pruning and one measurement of perplexity each, in this process."""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.costs import CpuSeconds, method_seconds, passes_of, training_passes
from benchmarks.quality.rows import amount
from benchmarks.quality.store import Measured, Store
from shardprune import EvaluateRecipe, Recipe, evaluate, prune
from shardprune.errors import InputError
from shardprune.recipes.demo import bundled_model
from shardprune.report.progress import Reporter
from shardprune.storage.output_names import RESULT

EXACT = 5e-5  # of a sparsity that is shown with four digits; a small model may miss it by a weight a projection


@dataclass(frozen=True)
class Case:
    """A model, the text that it is measured on, and sources of calibration text by their names in the table."""

    model: str
    eval: str
    texts: Mapping[str, str]

    @classmethod
    def parse(cls, words: list[str]) -> "Case":
        """Read a case from the words MODEL EVAL NAME=SOURCE ..., where the model may be `bundled`."""
        model, text, *named = words
        if not named or not all(word.find("=") > 0 for word in named):
            raise ValueError(f"{' '.join(words)!r} is no case; use MODEL EVAL NAME=SOURCE ...")
        return cls(bundled_model() if model == "bundled" else model, text, dict(word.split("=", 1) for word in named))

    @property
    def name(self) -> str:
        return Path(self.model).name


class Measurer:
    """Rows of one case, taken from the store where they are there.

    Args:
        shared: fields of every recipe.
        evaluation: fields of every measurement of perplexity.
    """

    def __init__(self, case: Case, store: Store, shared: dict[str, Any], evaluation: dict[str, Any]) -> None:
        self.case, self.store = case, store
        self._shared, self._evaluation = shared, evaluation
        self._work = store.folder / case.name
        self._text = self._work / "self-{seed}-{samples}x{seqlen}".format(**shared)  # the run whose model writes it

    def dense(self) -> float:
        """Return the perplexity of the model as it is."""
        place, recipe = (self.case.name, "dense"), self._evaluating(self.case.model)
        found = self.store.find(place, recipe)
        if found is None:
            out = self._work / "measuring"
            found = Measured(self._perplexity(self.case.model, out=str(out)), 0.0, 0.0, 0.0)
            shutil.rmtree(out)
            self.store.keep(place, recipe, found)
        return found.perplexity

    def recipe(self, text: str, setting: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a row's recipe; `self` is written once for all rows."""
        source = self.case.texts[text]
        return {
            **self._shared,
            **amount(setting),
            "targets": "own",  # also on text of the model's own, where `auto` would take the stream
            **fields,
            "model": self.case.model,
            "calibration": f"self:{self._text}" if source == "self" else source,
        }

    def refusal(self, recipe: dict[str, Any]) -> str | None:
        """Return why this version carries out no such recipe; None where it does."""
        try:
            Recipe.checked({**recipe, "out": "nowhere"})
        except InputError as error:
            return str(error).split(";")[0]
        return None

    def row(self, place: tuple[str, str, str], recipe: dict[str, Any]) -> Measured:
        """Return a row, measured now if it was not before.

        Args:
            place: text, setting, and the row's name.
        """
        place_of_row = (self.case.name, *place)
        measuring = {"recipe": recipe, "evaluation": self._evaluating(self.case.model)}
        if found := self.store.find(place_of_row, measuring):
            return found
        if recipe["calibration"].startswith("self:") and not (self._text / RESULT).exists():
            self._write_text()
        out = self._work / "pruning"
        shutil.rmtree(out, ignore_errors=True)  # of a row that was cut off
        reporter = Reporter(quiet=True)
        reporter.events = clock = CpuSeconds()
        result = prune(Recipe.checked({**recipe, "out": str(out), "report": False}), reporter)
        assert result.sparsity is not None
        achieved, target = result.sparsity.achieved, result.sparsity.target
        allowed = max(EXACT, len(result.sparsity.projections) / result.model.parameters_before)
        assert ":" in place[1] or abs(achieved - target) < allowed, f"{place}: {achieved}, not {target}"
        settings = result.recipe
        passes = passes_of(out, len(result.sparsity.layers), settings["samples"], settings["wave"])  # of pruning alone
        passes += training_passes(settings.get("reconstruct") or 0, settings["samples"], settings["seqlen"])
        here = settings["backend"] == "local" and settings["device"] == "cpu"
        seconds = method_seconds(clock.seconds if here else result.seconds)
        measured = Measured(self._perplexity(str(out)), seconds, passes, achieved)
        shutil.rmtree(out)
        self.store.keep(place_of_row, measuring, measured)
        print(f"{' / '.join(place_of_row)}: {measured.perplexity:.3f}", file=sys.stderr, flush=True)
        return measured

    def _write_text(self) -> None:
        """Let the model write its calibration text, unless it has; the cheapest run there is comes with it."""
        cheap = {"method": "magnitude", "sparsity": 0.0, "measure_error": False, "report": False}
        fields = {**self._shared, **cheap, "model": self.case.model, "calibration": "self"}
        prune(Recipe.checked({**fields, "out": str(self._text)}), Reporter(quiet=True))

    def _evaluating(self, model: str) -> dict[str, Any]:
        return {**self._evaluation, "model": model, "perplexity": [self.case.eval]}

    def _perplexity(self, model: str, **fields: Any) -> float:
        recipe = EvaluateRecipe.checked({**self._evaluating(model), **fields, "report": False})
        (measured,) = evaluate(recipe, Reporter(quiet=True)).evaluation.perplexity.values()
        assert measured.value is not None, f"{model}: perplexity is not finite"
        return measured.value
