"""The folder of an export: sparse files of a checkpoint, what lies beside its weights, and `export.json`.

The weights, their index and the result of the run have other names than in the checkpoint, so that no program takes the
folder for one: config and tokenizer keep theirs.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from shardprune.errors import InputError
from shardprune.model.checkpoint import INDEX, is_plain_name, locate
from shardprune.model.companions import is_template
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import fitting
from shardprune.storage.malformed import located, shown
from shardprune.storage.manifest import FileRecord
from shardprune.storage.output_names import CONVERSION, EXPORT, RESULT
from shardprune.storage.sealed_json import sealed_fields, unsealed
from shardprune.storage.sparse_file import Compression, SparseFile

PREFIX = "sparse-"


class Export(BaseModel):
    """The content of `export.json`.

    Attributes:
        files: of the checkpoint, by their names there; of the weights the digest is that of the header.
        semi_structured: names in the files of the 2:4 weights that are compressed for torch's kernels when loaded.
        stored_bytes: of all files of the export beside this one; None as long as it is not finished.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    fingerprint: str
    format: Literal["sparse", "semi-structured"]
    compression: Compression
    files: dict[str, FileRecord]
    semi_structured: list[str] = []
    stored_bytes: Annotated[int, Field(ge=0)] | None = None

    @property
    def weights(self) -> list[str]:
        """The names of the checkpoint's files of weights."""
        return [name for name in self.files if name.endswith(".safetensors")]

    @property
    def bytes(self) -> int:
        """The bytes of the checkpoint's files."""
        return sum(record.bytes for record in self.files.values())

    def write(self, folder: Folder) -> None:
        """Write `export.json`.

        Raises:
            StorageError: storage cannot be written.
        """
        folder.write_json(EXPORT, sealed_fields(self.model_dump(mode="json")))

    @classmethod
    def read(cls, folder: Folder) -> "Export":
        """Read `export.json`.

        Raises:
            Malformed: it is not what was written.
        """
        return fitting(unsealed(folder.read_json(EXPORT)), cls)


def stored_as(name: str) -> str:
    """Return the name in an export of a file of the checkpoint."""
    return f"{PREFIX}{name}" if name.endswith(".safetensors") or name in (INDEX, RESULT) else name


def open_export(place: str, field: str = "model") -> tuple[Folder, Export]:
    """Open a finished export.

    Raises:
        InputError: there is none, it is not finished, or `export.json` is damaged; names `field`.
    """
    folder = Folder(locate(place, field), field)
    if folder.is_file(CONVERSION):
        reason = "holds a model in the format of an engine, from which no way leads back; give its checkpoint"
        raise InputError(field, f"{place!r} {reason}")
    if not folder.is_file(EXPORT):
        raise InputError(field, f"{place!r} holds no {EXPORT}: give the directory of an export")
    with located(field, f"{folder.url}/{EXPORT}"):
        export = Export.read(folder)
    if wrong := next((name for name in export.files if not (is_plain_name(name) or is_template(name))), None):
        raise InputError(field, f"{folder.url}/{EXPORT} names {shown(wrong)}, which is no file of a folder")
    if export.stored_bytes is None:
        raise InputError(field, f"{place!r} is not finished; the command that began it goes on")
    if missing := next((name for name in export.files if not folder.is_file(stored_as(name))), None):
        raise InputError(field, f"{folder.url}/{stored_as(missing)} does not exist")
    return folder, export


def open_weights(folder: Folder, export: Export) -> dict[str, SparseFile]:
    """Open the sparse files of an export, by the names of the checkpoint's files.

    Raises:
        InputError: one is damaged, or of another export.
    """
    opened = {}
    for name in export.weights:
        opened[name] = file = SparseFile.open(folder, stored_as(name))
        if file.record.fingerprint != export.fingerprint:
            raise InputError(folder.field, f"{folder.url}/{file.name} belongs to another export")
    return opened
