"""Candidates of `mop` that are fine-tuned for a while before they are scored. What is tuned is thrown away.

The workers of the search have written both candidates as checkpoints and are gone, so that the fine-tuning, which is
that of `recover`, has their devices. A candidate's result stands in its output until the iteration is decided: a search
that is cut off goes on with the candidate, and the step, at which it was.
"""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from shardprune.cluster.defaults import device_of
from shardprune.cluster.group import Backend
from shardprune.commands.prepare_recovery import open_inputs, recorded_threads
from shardprune.commands.recover import fine_tuned
from shardprune.errors import InputError
from shardprune.model.checkpoint import INDEX
from shardprune.model.structure.path import Letter
from shardprune.recipes.groups import BackendFields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.report.clock import Clock
from shardprune.report.progress import Reporter
from shardprune.report.result import Result
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
        reporter.say(f"iteration {iteration}: tuning {' and '.join(letters)}")
        with clock.phase("tune"):
            results = self._trained([f"{self._out}/{self.place(iteration, letter)}" for letter in letters])
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        for letter, result in zip(letters, results, strict=True):
            (measured,) = result.perplexity.values()
            assert measured.before is not None
            assert measured.after is not None
            key = "L" if letter == "L" else "G"
            before[key], after[key] = measured.before, measured.after
        self.known[iteration] = TunedScores(before, after)

    def _trained(self, models: list[str]) -> list[Result]:
        """Train candidates: at the same time on a share of the slots each, if there is room; else one after another."""
        trainings = [partial(_train, self._settings_of(model)) for model in models]
        if len(models) > 1 and self._all_fit(models):
            return self._backend.in_shares(trainings)
        return [train(self._backend) for train in trainings]

    def _all_fit(self, models: list[str]) -> bool:
        """Return whether the backend has room for all trainings at the same time."""
        recipe, slots = self._recipe, self._backend.slots()
        share = slots.share(len(models))
        if not self._backend.concurrent or recipe.tune_zero == 3:  # its share of GPUs may not hold the model
            return False
        if device_of(recipe.device, slots) == "cuda":
            return share.gpus > 0
        # What is begun goes on with the threads that it had.
        recorded = [recorded_threads(self._settings_of(model).out) for model in models]
        threads = max(recipe.threads or 1, *(one or 1 for one in recorded))
        return threads <= min(share.cpus, share.cpus_of_a_node)

    def remove(self, iteration: int | None = None) -> None:
        """Remove all that is there, but for that of an iteration."""
        kept = () if iteration is None else (f"{FOLDERS}{iteration:02d}-", WINDOWS)
        for name in self._folder.names():
            if name.startswith(FOLDERS) and not name.startswith(kept):
                (self._folder.remove if name == WINDOWS else self._folder.remove_folder)(name)

    def _settings_of(self, model: str) -> RecoverRecipe:
        """Return the recipe of a candidate's training."""
        return self._settings(model, f"{model}-tuned", (f"{self._out}/{WINDOWS}",))

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


def _train(recipe: RecoverRecipe, backend: Backend) -> Result:
    return fine_tuned(recipe, backend, Reporter(quiet=True), Clock(Reporter(quiet=True).events))
