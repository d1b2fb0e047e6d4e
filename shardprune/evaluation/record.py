"""The result.json that measurements are written to: the model's own, or one in a separate directory."""

from typing import Any

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.report.result import Evaluation, EvaluationResult, Result
from shardprune.storage.folder import Folder, output_folder
from shardprune.storage.journal import lasting_names
from shardprune.storage.json_file import fitting
from shardprune.storage.locations import absolute
from shardprune.storage.malformed import Malformed, located
from shardprune.storage.output_names import RESULT
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
        with located(self.folder.field, f"the evaluation in {self.folder.url}/{RESULT}"):
            self.known = fitting(content.get("evaluation", {}), Evaluation) if self.kept else Evaluation()

    def made(self) -> Result | None:
        """Return the result of the run that made the model as its file has it now; None if it is not written to."""
        if not self.kept or self._alone:
            return None
        try:
            return fitting(_content(self.folder), Result)
        except Malformed:
            return None  # by an earlier version

    def save(self, result: EvaluationResult) -> None:
        """Write a result, on its own or as the evaluation in the result of the run that made the model."""
        if not self.kept:
            return
        content = result.as_json()
        if not self._alone:
            content = {**_content(self.folder), "evaluation": content["evaluation"]}
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
