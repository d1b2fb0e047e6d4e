"""The result.json that measurements are written to: the model's own, or one in a separate directory."""

from collections.abc import Callable
from typing import Any

from shardprune.errors import InputError, StorageError
from shardprune.model.checkpoint import Checkpoint
from shardprune.report.result import Evaluation, EvaluationResult, Result
from shardprune.storage.folder import Folder, output_folder
from shardprune.storage.journal import lasting_names
from shardprune.storage.json_file import fitting
from shardprune.storage.locations import absolute
from shardprune.storage.malformed import Malformed, located
from shardprune.storage.output_names import RESULT
from shardprune.storage.owner import one_at_a_time
from shardprune.storage.relative_paths import absolute_paths, relative_paths


class Record:
    """The result.json that receives measurements; `known` are those that it already holds.

    Args:
        out: a directory for the evaluation alone; None for the model's own result.json, if it has one.

    Raises:
        InputError: `out` holds anything but an evaluation of the same model, or cannot be written.
    """

    def __init__(self, checkpoint: Checkpoint, out: str | None) -> None:
        self.fingerprint = checkpoint.identity()
        self.folder = output_folder(absolute(out)) if out else checkpoint.folder
        self._alone = out is not None
        content = _content(self.folder)
        if self._alone:
            self._claim(content)
        self.kept = self._alone or _is_result(content)
        if self.kept:
            self._check_writable()
        self.known = (evaluation_in(self.folder) if self.kept else None) or Evaluation()

    def made(self) -> Result | None:
        """Return the result of the run that made the model as its file has it now; None if it is not written to."""
        if not self.kept or self._alone:
            return None
        try:
            return fitting(_content(self.folder), Result)
        except Malformed:
            return None  # by an earlier version

    def add(self, measured: dict[str, Any], result: Callable[[], EvaluationResult]) -> None:
        """Add measurements to those in the file, which another evaluation may have written since, and write the result
        that is made of all `known`: on its own, or as the evaluation in the result of the run that made the model.

        Args:
            measured: fields of the evaluation; items of an object are added to it.

        Raises:
            StorageError: the model's result is gone, or cannot be written.
        """
        if not self.kept:
            self.known = joined(self.known, measured)
            return
        with one_at_a_time(self.folder):
            there = evaluation_in(self.folder) or Evaluation()
            others = {name: value for name in there.model_fields_set if (value := getattr(there, name)) is not None}
            self.known = joined(joined(self.known, others), measured)
            content = result().as_json()
            if not self._alone:
                made = _content(self.folder)
                if not _is_result(made):
                    gone = "holds no result of shardprune any more: what was measured is not written"
                    raise StorageError(self.folder.field, f"{self.folder.url} {gone}")
                content = {**made, "evaluation": content["evaluation"]}
            self.folder.write_json(RESULT, relative_paths(content, self.folder.url))

    def _check_writable(self) -> None:
        try:
            self.folder.check_writable()
        except InputError as error:
            if self._alone:
                raise
            raise InputError(error.field, f"{error.problem}; give another place with --out") from error
        self.folder.remove_partial()  # of an evaluation that was killed while it wrote

    def _claim(self, content: dict[str, Any]) -> None:
        url = self.folder.url
        if lasting_names(self.folder):
            if content.get("command") != "evaluate":
                raise InputError("out", f"{url} is not empty and holds no evaluation; choose an empty directory")
            if content.get("fingerprint") != self.fingerprint:
                raise InputError("out", f"{url} holds the evaluation of another model; choose an empty directory")


def evaluation_in(folder: Folder) -> Evaluation | None:
    """Return what was measured of the model in a folder, as its file has it now, if anything was.

    Raises:
        InputError: it is none that this version reads.
    """
    with located(folder.field, f"the evaluation in {folder.url}/{RESULT}"):
        found = _content(folder).get("evaluation")
        return None if found is None else fitting(found, Evaluation)


def joined(known: Evaluation, measured: dict[str, Any]) -> Evaluation:
    """Return an evaluation with further fields, the items of objects added to those that are known."""
    fields = {
        name: {**getattr(known, name), **value} if isinstance(value, dict) else value
        for name, value in measured.items()
    }
    return known.model_copy(update=fields)


def _content(folder: Folder) -> dict[str, Any]:
    """Return the fields of a folder's result.json; empty if there is none, or it is not shardprune's."""
    if not folder.is_file(RESULT):
        return {}
    try:
        content = absolute_paths(folder.read_json(RESULT), folder.url)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_result(content: dict[str, Any]) -> bool:
    """Return whether the content is the result of a shardprune run that made a model."""
    return {"version", "command", "fingerprint", "recipe"} <= content.keys() and content["command"] != "evaluate"
