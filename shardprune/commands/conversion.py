"""The story of `shardprune export` into the format of one engine, which a converter or torchao writes.

The folder begins with a record of what it will be, gets its files in one go from a scratch folder, and ends with their
sizes in the record: a conversion that was cut off, or that storage refused a file of, is made again from the start by
the same command.
"""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from shardprune.commands.converters import dtype_of, program_of, run_converter
from shardprune.commands.gguf_layers import check_layers
from shardprune.errors import ConversionError, InputError, StorageError, first_line
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.companions import TOKENIZER, companions, is_template
from shardprune.model.int8 import check_int8, write_int8
from shardprune.recipes.export import ExportRecipe
from shardprune.report.progress import Reporter
from shardprune.storage.digests import digest_of
from shardprune.storage.folder import CHUNK, Folder, sync_folder
from shardprune.storage.journal import lasting_names
from shardprune.storage.json_file import dump_json, fitting
from shardprune.storage.malformed import Malformed
from shardprune.storage.output_names import CARD, CONVERSION, STATE
from shardprune.storage.owner import check_unowned, owned
from shardprune.storage.retrying import preflight
from shardprune.storage.sealed_json import sealed_fields, unsealed

SCRATCH = "converting"  # folder inside the output while it is made
TERMS = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")  # which go with the weights in every format


class Conversion(BaseModel):
    """The content of `conversion.json`.

    Attributes:
        dtype: number format of the weights, by its name in torch.
        bytes: of the checkpoint's files of weights.
        files: sizes in bytes of the files beside this one and in folders there, by their relative paths; None as long
            as they are not all there.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    fingerprint: str
    format: Literal["gguf", "ctranslate2", "openvino", "torchao"]
    dtype: str
    bytes: Annotated[int, Field(ge=0)]
    files: dict[str, Annotated[int, Field(ge=0)]] | None = None

    @property
    def stored_bytes(self) -> int | None:
        """The bytes of the files beside this one; None as long as they are not all there."""
        return None if self.files is None else sum(self.files.values())

    def write(self, folder: Folder) -> None:
        """Write `conversion.json`.

        Raises:
            StorageError: storage cannot be written.
        """
        folder.write_json(CONVERSION, sealed_fields(self.model_dump(mode="json")))


def convert(recipe: ExportRecipe, reporter: Reporter) -> Conversion:
    """Write a checkpoint in the format of an engine; return what `conversion.json` says.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        ConversionError: the converter refuses the checkpoint; nothing of it is left then.
        StorageError: storage stays away, or the checkpoint changed meanwhile; the same command makes it again.
    """
    with preflight():
        source = Checkpoint(recipe.model)
        if source.fp8:  # converters read the files, each in its own way or without the scales
            raise InputError(
                "format", f"{recipe.format!r} is not made of FP8 weights, as {source.folder.url} has; use sparse"
            )
        if source.folder.is_file(STATE):
            raise InputError("model", f"{source.folder.url} is not finished: {STATE} is there")
        program: list[str] = []
        if recipe.format == "torchao":
            check_int8(source)
        else:
            if recipe.format == "gguf":
                check_layers(source.config)
            program = program_of(recipe.format, recipe.converter)
        planned = _planned(source, recipe)
        target = Folder(recipe.to, "to")
        found = _found(target, planned)
        if found and found.files is not None:
            reporter.say(f"{target.url} is finished already")
            return found
        check_unowned(target)
        target.check_writable()
    with _nothing_left(target), owned(target):
        target.remove_partial()
        planned.write(target)
        try:
            with _scratch(target) as scratch, reporter.step("convert", 1) as step:
                local, made = _local(source, scratch), scratch / "made"
                made.mkdir()
                if recipe.format == "torchao":
                    write_int8(source, local, made)
                else:
                    run_converter(program, recipe.format, local, made, planned.dtype)
                source.check_unchanged()
                _take_along(local, recipe.format, made)
                files = _put(made, target)
                step.advance(1)
        except (ConversionError, StorageError):
            with suppress(StorageError):  # the first error is the one to report, and a record may stay
                _withdraw(target)
            raise
        planned.files = files
        planned.write(target)
    return planned


def _withdraw(target: Folder) -> None:
    """Remove the record of a conversion that has put no file beside it. With files it stays: the same command goes on
    from it, and would take them for another's without it."""
    if lasting_names(target) <= {CONVERSION}:
        target.remove(CONVERSION)


@contextmanager
def _nothing_left(target: Folder) -> Iterator[None]:
    """Remove a local folder that a failed conversion leaves empty."""
    try:
        yield
    finally:
        if target.local:
            with suppress(OSError):  # not empty
                os.rmdir(target.root)


def _planned(source: Checkpoint, recipe: ExportRecipe) -> Conversion:
    """Return what `conversion.json` says at first."""
    sizes: Counter[str] = Counter()
    for entry in source.entries.values():
        sizes[str(entry.dtype).removeprefix("torch.")] += entry.size
    own = sizes.most_common(1)[0][0]
    dtype = "int8" if recipe.format == "torchao" else dtype_of(recipe.format, recipe.dtype, own)
    return Conversion(
        fingerprint=digest_of(dump_json([source.identity(), recipe.format, dtype]).encode()),
        format=recipe.format,  # type: ignore[arg-type]  # the recipe has the others, too
        dtype=dtype,
        bytes=sum(source.folder.size(name) or 0 for name in source.source.stamps if name.endswith(".safetensors")),
    )


def _found(target: Folder, planned: Conversion) -> Conversion | None:
    """Return the same conversion, whole or begun, that a folder holds; None if the folder is empty.

    Raises:
        InputError: it holds something else.
    """
    names = lasting_names(target)
    if not names:
        return None
    try:
        found = fitting(unsealed(target.read_json(CONVERSION)), Conversion) if CONVERSION in names else None
    except Malformed:
        found = None
    if found is None:
        raise InputError("to", f"{target.url} is not empty and holds no conversion; choose an empty directory")
    if found.fingerprint != planned.fingerprint:
        raise InputError("to", f"{target.url} holds another conversion; choose an empty directory")
    if found.files is not None:
        for name, size in found.files.items():
            if target.size(name) != size:
                raise InputError("to", f"{target.url}/{name} is not what was written; choose an empty directory")
    return found


@contextmanager
def _scratch(target: Folder) -> Iterator[Path]:
    """Make an empty local folder that lasts as long as the block: in the output if that is local, so that files move
    there and are not copied."""
    if not target.local:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    place = Path(target.path(SCRATCH))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _local(source: Checkpoint, scratch: Path) -> Path:
    """Return a local folder of a checkpoint's own files, which are links if it is local. Converters take other files
    that lie beside them for theirs, and the folder's name for the model's."""
    folder = source.folder
    place = scratch / "source" / (Path(folder.root).name or "model")
    place.mkdir(parents=True)
    names = {*source.source.stamps, *companions(folder), *(name for name in (CARD, *TERMS) if folder.is_file(name))}
    for name in sorted(names):
        (place / name).parent.mkdir(exist_ok=True)
        if folder.local:
            os.symlink(Path(folder.path(name)).resolve(), place / name)
        else:
            _copy(folder, name, Folder(str(place), "model"))
    return place


def _take_along(local: Path, format: str, made: Path) -> None:
    """Put the checkpoint's terms beside what was made of it, and its tokenizer if the format has none in its file."""
    for path in sorted(path for path in local.rglob("*") if path.is_file()):
        name = path.relative_to(local).as_posix()
        of_tokenizer = name in TOKENIZER or name.startswith("chat_template") or is_template(name)
        wanted = name in TERMS or (of_tokenizer and format != "gguf")
        if wanted and not (made / name).exists():
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, made / name)


def _put(made: Path, target: Folder) -> dict[str, int]:
    """Put the files that were made, those in folders too, into the output; return their sizes in bytes by their paths
    relative to it.

    Raises:
        StorageError: the output cannot be written.
    """
    paths = sorted(path for path in made.rglob("*") if path.is_file())
    sizes = {path.relative_to(made).as_posix(): path.stat().st_size for path in paths}
    for name in sizes:
        try:
            if target.local:
                _move(made / name, Path(target.path(name)))
            else:
                # As a folder of its own: a file's temporary name is beside it.
                _copy(Folder(str((made / name).parent), "to"), Path(name).name, _parent(target, name))
        except OSError as error:
            raise StorageError("to", f"{target.url}/{name} cannot be written: {first_line(error)}") from error
    return sizes


def _parent(target: Folder, name: str) -> Folder:
    """Return the folder that a file of an output is in, without what an earlier attempt left unfinished there."""
    inner = name.rpartition("/")[0]
    if not inner:
        return target
    folder = Folder(f"{target.url.rstrip('/')}/{inner}", target.field)
    folder.remove_partial()
    return folder


def _move(source: Path, place: Path) -> None:
    """Move a file within a local file system, to stay there if power is lost."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, place)
    for folder in (place.parent, *(folder.parent for folder in made)):
        sync_folder(str(folder))


def _copy(source: Folder, name: str, target: Folder) -> None:
    size = source.size(name) or 0

    def parts() -> Iterator[bytes]:
        for start in range(0, size, CHUNK):
            yield source.read_range(name, start, min(start + CHUNK, size))

    target.write(name, parts)
