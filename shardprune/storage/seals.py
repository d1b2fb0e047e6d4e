"""Seals: a file that a run has written says in its header, as JSON, whose it is, the digest of each of its tensors, and
the digest of all that the header says.

The header stands before the data, so tensors are hashed before they are written. Of two files with the same header the
tensors are the same, or one is damaged.
"""

from collections.abc import Mapping
from typing import Any

from shardprune.storage.digests import digest_of
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import dump_json, parse_json
from shardprune.storage.safetensors_file import NAMES, Entry, Shapes, read_header

KEY = "shardprune"  # of the record in the metadata of a file
DIGESTS, SEAL = "digests", "seal"  # fields of the record


class BrokenSeal(ValueError):
    """A file is not what was written. Its text says in which way."""


class NoSeal(ValueError):
    """A file was written by another program, or by another version of this one."""


def sealed(record: Mapping[str, Any], digests: Mapping[str, str], shapes: Shapes) -> dict[str, str]:
    """Return the metadata of a file with a record.

    Args:
        digests: of its tensors, by name.
    """
    fields = parse_json(dump_json({**record, DIGESTS: dict(sorted(digests.items()))}))  # as it is read back
    return {KEY: dump_json({**fields, SEAL: _seal(fields, shapes)})}


def read_sealed(folder: Folder, file: str) -> tuple[dict[str, Entry], dict[str, Any], dict[str, str]]:
    """Return the entries of a sealed file, its record, and the digests of its tensors.

    Raises:
        InputError: it is no safetensors file.
        NoSeal: it has no seal.
        BrokenSeal: its header is not the one that was written.
    """
    entries, metadata = read_header(folder, file)
    try:
        fields = parse_json(metadata[KEY])
        seal, digests = fields.pop(SEAL), fields[DIGESTS]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise NoSeal("was written by another version") from error
    shapes = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if seal != _seal(fields, shapes) or digests.keys() != entries.keys():
        raise BrokenSeal("has another header than was written")
    del fields[DIGESTS]
    return entries, fields, digests


def _seal(fields: Mapping[str, Any], shapes: Shapes) -> str:
    stated = {name: [NAMES[dtype], list(shape)] for name, (dtype, shape) in shapes.items()}
    return digest_of(dump_json([fields, stated], sort_keys=True).encode())
