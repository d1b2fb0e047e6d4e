"""Scripts as files, and as jobs in Slurm's queue."""

import subprocess
from pathlib import Path

from shardprune.errors import InputError


def write_script(path: Path, text: str) -> None:
    """Write a script, but never over anything else.

    Raises:
        InputError: the file holds something else, or cannot be written.
    """
    try:
        if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
            raise InputError(
                "script", f"{str(path)!r} exists and holds something else; remove it or choose another name"
            )
        path.write_text(text)
    except OSError as error:
        raise InputError("script", f"{str(path)!r} cannot be written: {error.strerror}") from error


def submit_script(path: Path) -> str:
    """Submit a script; the number of its job.

    Raises:
        InputError: Slurm is not here, or refuses the job.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError("submit", f"sbatch is not installed here; {str(path)!r} is written") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise InputError("submit", said[-1] if said else f"sbatch ended with code {done.returncode}")
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow
