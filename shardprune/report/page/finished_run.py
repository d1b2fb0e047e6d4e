"""The finished runs in an output, with result and events."""

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from shardprune.errors import InputError, without_credentials
from shardprune.report.events import read_events
from shardprune.report.page.history import History
from shardprune.report.result import EvaluationResult, Result, read_result
from shardprune.report.status import status_of
from shardprune.storage.folder import Folder
from shardprune.storage.locations import READ_ONLY
from shardprune.storage.malformed import Malformed
from shardprune.storage.output_names import RESULT, STATE, run_of
from shardprune.storage.relative_paths import absolute_paths
from shardprune.storage.run_folders import run_folders


@dataclass(frozen=True)
class FinishedRun:
    """A run's result, with local paths relative to its folder, and its events in order; the events may be empty."""

    folder: str
    result: Result | EvaluationResult
    events: list[dict[str, Any]]

    @property
    def command(self) -> str:
        return self.result.command

    @property
    def model(self) -> str:
        """The name of the model: a hub name, a URL, or the last part of a local path."""
        given = self.result.recipe["model"]
        place = absolute_paths(given, self.folder)
        return given if place == given else place.rpartition("/")[2]

    @property
    def name(self) -> str:
        """The name of the output: a URL without credentials, or the last part of a local path."""
        return _name(self.folder)

    @property
    def attempts(self) -> int:
        """How often the command was started; 1 where events are missing."""
        return max(1, sum(event["event"] == "run" for event in self.events))

    @property
    def circumstances(self) -> list[str]:
        """A sentence on when, by which versions and on which kind of machine the last attempt ran; none where events
        are missing or those of a version that did not record them."""
        begun = next((event for event in reversed(self.events) if event["event"] == "run"), None)
        if begun is None:
            return []
        date = datetime.fromtimestamp(begun["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
        versions = ", ".join(f"{name} {version}" for name, version in begun.get("versions", {}).items())
        by = f" with {versions}" if versions else ""
        on = f"; its driver ran on {begun['machine']}" if "machine" in begun else ""
        return [f"Started {date}{by}{on}."]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of all attempts, without the time between them."""
        if self.attempts == 1:
            return self.result.seconds["total"]
        history = History(self.events)
        return history.at(history.end)

    @cached_property
    def parent(self) -> "FinishedRun | None":
        """The run that made this run's input model, if known."""
        given = absolute_paths(self.result.recipe["sparse" if self.command == "rebuild" else "model"], self.folder)
        if given.startswith(READ_ONLY) or (not given.startswith("/") and "://" not in given):
            return None  # a name of the hub, or one whose folder is not known
        folder = Folder(given, "model")
        if not folder.is_file(RESULT):
            folder = Folder(run_of(given), "model")
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
    found = [_finished(folder) for folder in run_folders(out) if folder.is_file(RESULT)]
    if not found:
        raise InputError("out", f"{out!r} holds no finished run; `shardprune status` says where one stands")
    return found


def unfinished_runs(out: str) -> list[str]:
    """Return the runs in an output that are not finished, each by its name and how far it is."""
    begun = [folder.url for folder in run_folders(out) if _begun(folder)]
    states: dict[str, str] = {}
    with suppress(InputError):  # none has events
        states = {status.folder: status.in_short() for status in status_of(out)} if begun else {}
    return [f"{_name(url)} ({states.get(url, 'without events')})" for url in begun]


def all_unfinished(out: str) -> bool:
    """Return whether an output holds runs, none of which is finished."""
    folders = run_folders(out)
    return any(map(_begun, folders)) and not any(folder.is_file(RESULT) for folder in folders)


def _begun(folder: Folder) -> bool:
    return folder.is_file(STATE) and not folder.is_file(RESULT)


def _name(folder: str) -> str:
    place = without_credentials(folder)
    return place if "://" in place else place.rstrip("/").rpartition("/")[2]


def _finished(folder: Folder) -> FinishedRun:
    try:
        return FinishedRun(folder.url, read_result(folder), read_events(folder))
    except Malformed as error:
        raise InputError(folder.field, f"{folder.url}/{RESULT} {error}") from error
