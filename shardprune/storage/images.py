"""Image files on any file system, read by Pillow."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from io import BytesIO
from typing import Any

from shardprune.errors import InputError, first_line
from shardprune.storage.locations import file_system
from shardprune.storage.retrying import retry, unhidden
from shardprune.storage.whole_files import read_file

THREADS = 16  # that look at files at a time: most of it is waiting for the storage


def blank_image(width: int, height: int) -> Any:
    """Return a black image."""
    return _pillow().new("RGB", (width, height))


def read_image(url: str, field: str) -> Any:
    """Read an image, in colours.

    Raises:
        InputError: it cannot be read; names `field`.
    """
    content = read_file(url, field)
    try:
        return _pillow().open(BytesIO(content)).convert("RGB")
    except Exception as error:  # each format raises errors of its own where a file is damaged
        raise InputError(field, f"{url!r} is no image: {first_line(error)}") from error


def image_sizes(urls: Sequence[str], field: str) -> list[tuple[int, int]]:
    """Return the width and height of images in pixels, of which no more than the beginnings are read.

    Raises:
        InputError: one is missing, or no image; names `field`.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(partial(_size, field=field), urls))


def _size(url: str, field: str) -> tuple[int, int]:
    fs, path = file_system(url, field)

    def look() -> tuple[int, int]:
        with unhidden(), fs.open(path, "rb") as file:
            return _pillow().open(file).size

    try:
        return retry(look, url)
    except FileNotFoundError as error:
        raise InputError(field, f"{url!r} does not exist") from error
    except Exception as error:  # of the file system, or of the format
        raise InputError(field, f"{url!r} is no image: {first_line(error)}") from error


def _pillow() -> Any:
    """Return Pillow's module of images, which is imported where there are some."""
    return import_module("PIL.Image")
