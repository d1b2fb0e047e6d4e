"""The finished runs in an output, with result and events."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardprune.errors import InputError
from shardprune.report.events import read_events
from shardprune.report.page.history import History
from shardprune.report.result import EvaluationResult, Result, read_result
from shardprune.storage.folder import READ_ONLY, Folder
from shardprune.storage.malformed import Malformed
from shardprune.storage.output_names import RESULT, run_folders


@dataclass(frozen=True)
class FinishedRun:
    """A run's result and its events in order; the events may be empty."""

    folder: str
    result: Result | EvaluationResult
    events: list[dict[str, Any]]

    @property
    def command(self) -> str:
        return self.result.command

    @property
    def model(self) -> str:
        return self.result.recipe["model"]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all attempts, without the time between them; without events, those of the last
        attempt.
        """
        if not self.events:
            return self.result.seconds["total"]
        history = History(self.events)
        return history.at(history.end)

    @cached_property
    def parent(self) -> "FinishedRun | None":
        """The run that made this run's input model, if known."""
        given = self.result.recipe["sparse" if self.command == "rebuild" else "model"]
        if given.startswith(READ_ONLY):
            return None
        folder = Folder(given, "model")
        try:
            found = _finished(folder) if folder.is_file(RESULT) else None
        except InputError:  # another program's file
            return None
        return found if found and isinstance(found.result, Result) else None


def finished_runs(out: str) -> list[FinishedRun]:
    """Return the run in an output, or those of a pipeline's steps.

    Raises:
        InputError: none is finished, or the result of one cannot be read.
    """
    folders = [Folder(url, "out") for url in run_folders(out)]
    found = [_finished(folder) for folder in folders if folder.is_file(RESULT)]
    if not found:
        raise InputError("out", f"{out!r} holds no finished run; `shardprune status` says where one stands")
    return found


def _finished(folder: Folder) -> FinishedRun:
    try:
        return FinishedRun(folder.url, read_result(folder), read_events(folder))
    except Malformed as error:
        raise InputError(folder.field, f"{folder.url}/{RESULT} {error}") from error
