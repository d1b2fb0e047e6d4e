"""Copies of small files in a temporary folder, for libraries that read from a local path only."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shardprune.errors import InputError, first_line

ENVIRONMENT = "TMPDIR"  # environment variable that names the folder for temporary files


@contextmanager
def local_copies(files: Mapping[str, bytes]) -> Iterator[str]:
    """Write files into a folder that lasts as long as the block, and return its path.

    Args:
        files: contents by name.

    Raises:
        InputError: there is no folder for temporary files, or no room in it; names the environment variable.
    """
    with ExitStack() as opened:
        try:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            for name, content in files.items():
                place = Path(folder, name)
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(content)
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise InputError(ENVIRONMENT, f"no temporary file can be written: {reason}") from error
        yield folder
