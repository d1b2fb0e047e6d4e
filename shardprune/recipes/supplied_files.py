"""The files that come along with the package: recipes, jobs, and configurations of Ray and Slurm."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from shardprune.errors import InputError

ONE = "ray_configs/runtime_env.yaml"  # of the files


def supplied_files() -> Path:
    """Return the directory that holds them: the repository, or `share/shardprune` of an environment.

    Raises:
        InputError: the package was copied here without them.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package.parent, package.parent / "share" / "shardprune", *_installed()):
        if (place / ONE).is_file():
            return place
    raise InputError("files", f"none lie beside {str(package)!r}; pip install shardprune brings them")


def _installed() -> Iterator[Path]:
    """Yield where an installer has put them."""
    try:
        files = metadata.files("shardprune") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.as_posix().endswith(f"share/shardprune/{ONE}"):
            yield Path(str(file.locate())).resolve().parents[1]
