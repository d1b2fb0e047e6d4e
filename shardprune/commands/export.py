"""The story of `shardprune export`: a pruned checkpoint in a form that is smaller, or the checkpoint back from it."""

from collections.abc import Iterator
from contextlib import contextmanager

from shardprune.commands.conversion import Conversion, convert
from shardprune.errors import InputError, StorageError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.exports import Export, open_export, open_weights, stored_as
from shardprune.model.semi_structured import compressible
from shardprune.recipes.export import LOSSLESS, ExportRecipe
from shardprune.report.progress import Reporter
from shardprune.storage.byte_planes import codec
from shardprune.storage.digests import digest_of
from shardprune.storage.folder import Folder
from shardprune.storage.journal import lasting_names
from shardprune.storage.json_file import dump_json
from shardprune.storage.malformed import Malformed
from shardprune.storage.manifest import FileRecord, manifest_faults, manifest_of
from shardprune.storage.output_names import BESIDE, CARD, EXPORT, RESTORED, RESULT, STATE
from shardprune.storage.owner import check_unowned, owned
from shardprune.storage.retrying import preflight
from shardprune.storage.sparse_file import belongs, write_sparse

# Files that go along where they are there, beside config and tokenizer.
GOES_ALONG = (RESULT, *BESIDE, CARD, "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


def export(recipe: ExportRecipe, reporter: Reporter | None = None) -> Export | Conversion:
    """Write a checkpoint in another form, or with `restore` an export's checkpoint; return what `export.json` or, in
    the format of an engine, `conversion.json` says.

    The same command goes on where it was cut off.

    Raises:
        InputError: something in the recipe cannot work; nothing has been written then.
        ConversionError: a converter refuses the checkpoint.
        StorageError: storage stays away, a file is damaged, or the checkpoint changed meanwhile.
    """
    reporter = reporter or Reporter()
    if recipe.format not in LOSSLESS:
        return convert(recipe, reporter)
    return _restore(recipe, reporter) if recipe.restore else _export(recipe, reporter)


def _export(recipe: ExportRecipe, reporter: Reporter) -> Export:
    with preflight():
        if recipe.compression == "zstd":
            codec()
        source = Checkpoint(recipe.model)
        if source.folder.is_file(STATE):
            raise InputError("model", f"{source.folder.url} is not finished: {STATE} is there")
        planned = _planned(source, recipe)
        target = Folder(recipe.to, "to")
        if _finished(target, planned):
            reporter.say(f"{target.url} is finished already")
            return open_export(recipe.to, "to")[1]
        _check_target(target)
    with owned(target), _at_work():
        target.remove_partial()
        planned.write(target)
        with reporter.step("export", len(planned.files)) as step:
            for name in planned.files:
                _write(source, name, target, planned)
                step.advance(1)
        source.check_unchanged()
        planned.stored_bytes = sum(target.size(stored_as(name)) or 0 for name in planned.files)
        planned.write(target)
    return planned


@contextmanager
def _at_work() -> Iterator[None]:
    """Report a damaged file that is met in the middle of the work as the end of a run, not as bad input."""
    try:
        yield
    except InputError as error:
        raise StorageError(error.field, error.problem) from error


def _planned(source: Checkpoint, recipe: ExportRecipe) -> Export:
    """Return what `export.json` says at first."""
    present = {name for name in GOES_ALONG if source.folder.is_file(name)}
    files = manifest_of(source.folder, {*source.source.stamps, *present})
    two_four: list[str] = []
    if recipe.format == "semi-structured":
        two_four = compressible(source)
    plain = {name: record.model_dump() for name, record in files.items()}
    identity = [source.identity(), plain, recipe.format, recipe.compression]
    return Export(
        fingerprint=digest_of(dump_json(identity).encode()),
        format=recipe.format,  # type: ignore[arg-type]  # the recipe has the engines', too
        compression=recipe.compression,
        files=files,
        semi_structured=two_four,
    )


def _write(source: Checkpoint, name: str, target: Folder, planned: Export) -> None:
    place = stored_as(name)
    if name in planned.weights:
        if not belongs(target, place, planned.fingerprint):
            write_sparse(source.folder, name, target, place, planned.fingerprint, planned.compression)
    elif name not in manifest_of(target, [place]) or manifest_faults(target, {place: planned.files[name]}):
        target.write_bytes(place, source.folder.read_bytes(name))


def _finished(target: Folder, planned: Export) -> bool:
    """Return whether a folder holds all of an export.

    Raises:
        InputError: it holds something else.
    """
    names = lasting_names(target)
    if not names:
        return False
    try:
        found = Export.read(target) if EXPORT in names else None
    except Malformed:
        found = None
    if found is None:
        raise InputError("to", f"{target.url} is not empty and holds no export; choose an empty directory")
    if found.fingerprint != planned.fingerprint:
        raise InputError("to", f"{target.url} holds another export; choose an empty directory")
    whole = (
        belongs(target, stored_as(name), planned.fingerprint)
        if name in planned.weights
        else target.is_file(stored_as(name))
        for name in planned.files
    )
    return found.stored_bytes is not None and all(whole)


def _check_target(target: Folder) -> None:
    check_unowned(target)
    target.check_writable()


def _restore(recipe: ExportRecipe, reporter: Reporter) -> Export:
    with preflight():
        source, export = open_export(recipe.model)
        weights = open_weights(source, export)
        if export.compression == "zstd":
            codec()
        target = Folder(recipe.to, "to")
        if _restored(target, export):
            reporter.say(f"{target.url} is finished already")
            return export
        _check_target(target)
    with owned(target), _at_work():
        target.remove_partial()
        target.write_json(RESTORED, {"fingerprint": export.fingerprint})
        left = manifest_faults(target, export.files)
        with reporter.step("restore", len(left)) as step:
            for name in left:
                if name in weights:
                    weights[name].restore(target, name)
                else:
                    target.write_bytes(name, source.read_bytes(stored_as(name)))
                step.advance(1)
        _check_restored(target, export.files)
        target.remove(RESTORED)
    return export


def _restored(target: Folder, export: Export) -> bool:
    """Return whether a folder holds an export's checkpoint.

    Raises:
        InputError: it holds something else.
    """
    names = lasting_names(target)
    if not names:
        return False
    if RESTORED in names:
        try:
            if target.read_json(RESTORED) == {"fingerprint": export.fingerprint}:
                return False
        except Malformed:
            pass
    elif not manifest_faults(target, export.files):
        return True
    raise InputError("to", f"{target.url} is not empty and holds another checkpoint; choose an empty directory")


def _check_restored(target: Folder, files: dict[str, FileRecord]) -> None:
    """Check that what was written is what the checkpoint was.

    Raises:
        StorageError: it is not.
    """
    for name, fault in manifest_faults(target, files).items():
        target.remove(name)
        raise StorageError("model", f"{name}, restored, {fault}: the export is damaged")
