"""Files that are read whole: texts, recipes, configs. They must have an end, and memory must have room for them."""

import os
import stat

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from shardprune.errors import InputError, first_line
from shardprune.storage.host_memory import host_memory
from shardprune.storage.locations import file_system
from shardprune.storage.quantities import gigabytes
from shardprune.storage.retrying import retry, unhidden


def read_file(url: str, field: str) -> bytes:
    """Read the bytes of one file.

    Raises:
        InputError: it is larger than a quarter of this machine's memory, or cannot be read; names `field`.
    """
    fs, path = file_system(url, field)

    def read() -> bytes:
        with unhidden():
            _check_room(fs.info(path).get("size") or 0)  # None where a web server does not say
            return content_of(fs, path)

    try:
        return retry(read, url)
    except FileNotFoundError as error:
        raise InputError(field, f"{url!r} does not exist") from error
    except Exception as error:  # file systems that read what a URL says of itself raise errors of every kind
        raise InputError(field, f"{url!r} cannot be read: {first_line(error)}") from error


def content_of(fs: AbstractFileSystem, path: str) -> bytes:
    """Return the bytes of a file; those of a local path only if they have an end, and memory has room for them."""
    if isinstance(fs, LocalFileSystem):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a device or a pipe"
            raise OSError(f"it is {kind}, not a file")
        _check_room(found.st_size)
    return fs.cat_file(path)


def _check_room(size: int) -> None:
    """Check that a file of so many bytes can be read whole, its text and what is made from that included."""
    limit = host_memory() // 4
    if size > limit:
        raise OSError(
            f"it is read whole and has {gigabytes(size)}; this machine's memory has room for {gigabytes(limit)}"
        )
