"""Candidates of `mop` that are fine-tuned for a while before they are scored. What is tuned is thrown away.

The workers of the search have written both candidates as checkpoints and are gone, so that the fine-tuning, which is
that of `recover`, has their devices. A candidate's result stands in its output until the iteration is decided: a search
that is cut off goes on with the candidate, and the step, at which it was.
"""

from dataclasses import dataclass

from torch import Tensor

from shardprune.cluster.group import Backend
from shardprune.commands.prepare_recovery import open_inputs
from shardprune.commands.recover import fine_tuned
from shardprune.errors import InputError
from shardprune.model.checkpoint import INDEX
from shardprune.model.structure.path import Letter
from shardprune.recipes.groups import BackendFields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from shardprune.storage.folder import Folder
from shardprune.storage.npy_file import npy_bytes

FOLDERS = "candidate-"  # how folders begin that hold candidates, and what is tuned
WINDOWS = f"{FOLDERS}windows.npy"  # the calibration windows


@dataclass(frozen=True)
class TunedScores:
    """Perplexities on the calibration windows by letter: of candidates as they are, and after their fine-tuning."""

    before: dict[str, float]
    after: dict[str, float]


class CandidateTuning:
    """The fine-tuning of candidates in the output `out` of a search."""

    def __init__(self, recipe: MopRecipe, out: str, backend: Backend) -> None:
        self._recipe, self._out, self._backend = recipe, out, backend
        self._folder = Folder(out, "out")
        self.known: dict[int, TunedScores] = {}  # by iteration

    def check(self) -> None:
        """Check that the original model could be tuned as candidates are to be.

        Raises:
            InputError: it could not; names the field of the search.
        """
        if "://" in self._out:
            raise InputError("tune_candidates", f"trains in {self._out!r}; use a directory that all nodes see")
        try:
            open_inputs(self._settings(self._recipe.model, f"{self._out}/{FOLDERS}tuned", ()), self._backend)
        except InputError as error:
            names = {"data": "tune_data", "length": "tune_length", "zero": "tune_zero"}
            raise InputError(names.get(error.field, error.field), error.problem) from error

    def place(self, iteration: int, letter: Letter) -> str:
        """Return the name of a candidate's folder."""
        return f"{FOLDERS}{iteration:02d}-{'L' if letter == 'L' else 'G'}"

    def written(self, iteration: int, letter: Letter) -> bool:
        """Return whether a candidate is written: its index comes last."""
        return Folder(f"{self._out}/{self.place(iteration, letter)}", "out").is_file(INDEX)

    def tune(self, iteration: int, letters: list[Letter], windows: Tensor, reporter: Reporter, clock: Clock) -> None:
        """Tune and score the candidates of an iteration, which are written."""
        self._folder.write_bytes(WINDOWS, npy_bytes(windows.numpy()))
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        for letter in letters:
            model = f"{self._out}/{self.place(iteration, letter)}"
            reporter.say(f"iteration {iteration}: tuning the candidate {letter}")
            recipe = self._settings(model, f"{model}-tuned", (f"{self._out}/{WINDOWS}",))
            with clock.phase("tune"):
                result = fine_tuned(recipe, self._backend, Reporter(quiet=True), Clock(Reporter(quiet=True).events))
            (measured,) = result.perplexity.values()
            assert measured.before is not None
            assert measured.after is not None
            key = "L" if letter == "L" else "G"
            before[key], after[key] = measured.before, measured.after
        self.known[iteration] = TunedScores(before, after)

    def remove(self, iteration: int | None = None) -> None:
        """Remove all that is there, but for that of an iteration."""
        kept = () if iteration is None else (f"{FOLDERS}{iteration:02d}-", WINDOWS)
        for name in self._folder.names():
            if name.startswith(FOLDERS) and not name.startswith(kept):
                (self._folder.remove if name == WINDOWS else self._folder.remove_folder)(name)

    def _settings(self, model: str, out: str, evaluations: tuple[str, ...]) -> RecoverRecipe:
        recipe = self._recipe
        values = {
            **{name: getattr(recipe, name) for name in BackendFields.model_fields},
            "model": model,
            "out": out,
            "data": recipe.tune_data,
            "steps": recipe.tune_candidates,
            "length": recipe.tune_length,
            "batch": recipe.tune_batch,
            "learning_rate": recipe.tune_learning_rate,
            "zero": recipe.tune_zero,
            "seed": recipe.seed,
            "eval": evaluations,
            "seqlen": recipe.seqlen,
            "report": False,
        }
        return RecoverRecipe.checked({name: value for name, value in values.items() if value is not None})
