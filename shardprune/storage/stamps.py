"""Stamps of files: what tells, without reading it, whether a file is still the one that it was."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from shardprune.storage.folder import Folder

# By what file systems tell versions of a file apart, the most exact first: tags of its content, then times.
VERSIONS = ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")


@dataclass(frozen=True)
class Stamp:
    """A file as it stood at some moment.

    `size` is in bytes. `version` is the tag of the content, where storage has one, else the time of the last change.
    `inode` tells files of one name apart on a local file system. `content` is the name that the hub's cache gives a
    file by its content.
    """

    size: int
    version: str
    inode: int | None = None
    content: str | None = None

    def is_copy_of(self, other: "Stamp") -> bool:
        """Return whether two files may be copies of one: of the same size, with the same time of the last change or
        the same name for their content."""
        same = self.version == other.version or (self.content is not None and self.content == other.content)
        return self.size == other.size and same


def stamps_of(folder: Folder, names: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamps of files in a folder by name, without those that are not there."""
    wanted = sorted(set(names))
    if folder.local:
        found = {name: _local_stamp(folder.path(name)) for name in wanted}
        return {name: stamp for name, stamp in found.items() if stamp}
    infos = folder.infos()  # one request, however many files
    for inner in {name.rpartition("/")[0] for name in wanted} - {""}:
        inside = Folder(f"{folder.url.rstrip('/')}/{inner}", folder.field).infos()
        infos |= {f"{inner}/{name}": info for name, info in inside.items()}
    return {name: Stamp(int(infos[name]["size"]), _version(infos[name])) for name in wanted if name in infos}


def _local_stamp(path: str) -> Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    folder, blob = os.path.split(os.path.realpath(path))
    content = blob if os.path.basename(folder) == "blobs" else None
    return Stamp(status.st_size, str(status.st_mtime_ns), status.st_ino, content)


def _version(info: dict[str, object]) -> str:
    return next((str(info[key]) for key in VERSIONS if info.get(key) is not None), "")
