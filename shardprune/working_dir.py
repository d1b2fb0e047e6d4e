"""The copy of a working directory in which Ray runs a submitted job, and which it removes afterwards."""

from pathlib import Path

from shardprune.errors import InputError
from shardprune.storage import absolute

COPIES = ("runtime_resources", "working_dir_files")  # where Ray unpacks what jobs are submitted with


def check_outlasts_job(field: str, url: str) -> None:
    """Check that what is written at a path or URL is still there after the job.

    Raises:
        InputError: it would lie in a copy of the working directory.
    """
    parts = Path(absolute(url)).parts
    if any(parts[at : at + len(COPIES)] == COPIES for at in range(len(parts))):
        raise InputError(
            field, f"{url!r} would be lost with this job's copy of the working directory; use an absolute path or a URL"
        )
