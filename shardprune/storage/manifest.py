"""Manifests: the size and the digest of every file that belongs to a finished output, as `result.json` has them.

The digest of a safetensors file is that of its header, which has those of its tensors (see `shardprune.storage.seals`);
so a manifest is compared without reading a weight.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from shardprune.storage.digests import digest_of
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import HEADER_LIMIT, HEADER_READ


class FileRecord(BaseModel):
    """A file that was written: its size in bytes, and the digest of its content, or of its header."""

    model_config = ConfigDict(frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    digest: str


def manifest_of(folder: Folder, names: Iterable[str]) -> dict[str, FileRecord]:
    """Return the records of files in a folder by name, without those that are not there."""
    sizes = {name: folder.size(name) for name in sorted(set(names))}
    present = {name: size for name, size in sizes.items() if size is not None}
    weights = [name for name in present if name.endswith(".safetensors")]
    starts = folder.read_ranges([(name, 0, min(present[name], HEADER_READ)) for name in weights]) if weights else []
    records = {}
    for name, start in zip(weights, starts, strict=True):
        length = 8 + int.from_bytes(start[:8], "little")
        end = min(length, present[name], HEADER_LIMIT)
        if end > len(start):
            start += folder.read_range(name, len(start), end)
        records[name] = FileRecord(bytes=present[name], digest=digest_of(start[:end]))
    for name in present.keys() - records.keys():
        content = folder.read_bytes(name)
        records[name] = FileRecord(bytes=len(content), digest=digest_of(content))
    return dict(sorted(records.items()))


def manifest_faults(folder: Folder, manifest: Mapping[str, FileRecord]) -> dict[str, str]:
    """Return what is wrong with the files of a manifest, by name; empty where nothing is."""
    found = manifest_of(folder, manifest)
    faults = {}
    for name, record in manifest.items():
        if name not in found:
            faults[name] = "is missing"
        elif found[name].bytes != record.bytes:
            faults[name] = f"has {found[name].bytes:,} bytes and had {record.bytes:,} when it was written"
        elif found[name].digest != record.digest:
            faults[name] = "is not what was written"
    return faults
