"""Folders of temporary files, for libraries that read local paths only."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from shardprune.errors import InputError, first_line


@contextmanager
def scratch_folder() -> Iterator[str]:
    """Provide an empty local folder, which goes with the block.

    Raises:
        InputError: this machine has no place for temporary files, or no room left there.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    except OSError as error:
        reason = first_line(error)
        raise InputError("TMPDIR", f"temporary files cannot be written: {reason}; name a folder with room") from error
