"""Locations that a recipe names: local paths and URLs of any file system that fsspec has."""

import os
import re
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.data import DataFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from shardprune.errors import InputError, first_line, without_credentials

UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # in no name of a file
LONGEST = 4096  # bytes of a path with its end, PATH_MAX of Linux
EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
}  # extras of this package that install a protocol's file system
READ_ONLY = "hf://"
KEYLESS = (*EXTRAS, "hf")  # protocols whose locations have no place for a user and a password


def file_system(url: str, field: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a location, and its path there.

    Raises:
        InputError: there is no such file system, or its package is not installed; names `field`.
    """
    # No cached listings, since other workers write, too. A model on the hub does not change during a run.
    if UNWRITABLE.search(url):
        raise InputError(field, f"{url!r} holds a character that no file's name has (NUL, or half a surrogate pair)")
    _refuse_keys(url, field)
    _refuse_unchained(url, field)
    options = {} if url.startswith(READ_ONLY) else {"use_listings_cache": False}
    try:
        fs, root = _local(url, **options) if is_path(url) else fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = EXTRAS.get(url.partition("://")[0])
        hint = f"pip install 'shardprune[{extra}]'" if extra else first_line(error)
        raise InputError(field, f"{url!r} needs a package that is not installed: {hint}") from error
    except Exception as error:  # constructors of file systems are given what they may not take
        raise InputError(field, f"{url!r} cannot be opened: {first_line(error)}") from error
    if isinstance(fs, DataFileSystem):
        raise InputError(field, f"{url!r} is data itself; give where files lie")
    if isinstance(fs, LocalFileSystem) and len(os.fsencode(root)) >= LONGEST:
        raise InputError(field, f"{url!r} is too long for a path: at most {LONGEST - 1:,} bytes")
    if "://" in url and not root.strip("/") and not isinstance(fs, LocalFileSystem | MemoryFileSystem):
        raise InputError(field, f"{url!r} names no place; give what stands after ://, too")
    return fs, root.rstrip("/") or root


def is_path(text: str) -> bool:
    """Return whether a location is a local path, in whose names `::` has no meaning."""
    return "://" not in text and not text.startswith("data:")


def _local(path: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    return LocalFileSystem(**options), LocalFileSystem._strip_protocol(path)


def _refuse_unchained(url: str, field: str) -> None:
    """Check that every `::` in a URL joins file systems, as fsspec would take another place for this one otherwise.

    Raises:
        InputError: one stands before or behind what names none.
    """
    links = [] if is_path(url) else url.split("::")
    for link in links[1:] and links:
        if "://" not in link and link not in fsspec.available_protocols():
            shown = without_credentials(url)
            raise InputError(field, f"{shown!r} holds '::', which joins file systems, beside {link!r}, which is none")


def _refuse_keys(url: str, field: str) -> None:
    """Check that no user and password stand in a location whose file system would take them for a part of its name, and
    say them in its errors.

    Raises:
        InputError: they do.
    """
    protocol, place = url.partition("://")[0], without_credentials(url)
    if protocol in KEYLESS and url.partition("?")[0] != place:
        raise InputError(
            field, f"{place!r} has a key before it, which {protocol}:// does not take; see docs/storage.md"
        )


def protocols_of(fs: AbstractFileSystem) -> set[str]:
    """Return the names of a file system's protocols, as URLs begin with them."""
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def absolute(url: str) -> str:
    """Return a path in absolute form, so that it means the same in every process; `file://` is stripped, other URLs are
    unchanged.
    """
    if url.startswith("file://"):
        return LocalFileSystem._strip_protocol(url)
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def check_reachable(field: str, url: str, backend: str) -> None:
    """Check that the workers of a backend, which may be other processes, reach a URL.

    Raises:
        InputError: it lives in this process's memory.
    """
    if url.startswith("memory://") and backend != "local":
        raise InputError(field, f"{url!r} lives in this process's memory; use backend local")


def refuse_hub(url: str, field: str) -> None:
    """Check that a location is none of the hub, which is only read from.

    Raises:
        InputError: it is one.
    """
    if url.startswith(READ_ONLY):
        raise InputError(field, f"{url} cannot be written: the hub is only read from")
