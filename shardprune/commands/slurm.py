"""The story of `shardprune slurm`: a recipe becomes a batch script, and the script a job in Slurm's queue."""

from collections.abc import Callable
from pathlib import Path

from shardprune.cluster.slurm.batch import BatchJob
from shardprune.cluster.slurm.commands import check_fit, command_of
from shardprune.cluster.slurm.submission import submit_script, write_script
from shardprune.errors import InputError
from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.settings import Settings
from shardprune.storage.folder import absolute


def slurm(
    recipe: str,
    overrides: list[str],
    job: BatchJob,
    load: Callable[[str], Settings],
    command: str | None = None,
    script: Path | None = None,
    submit: bool = False,
) -> str:
    """Write the script of a job that runs a recipe, and submit it.

    Args:
        overrides: words of the command line that override the recipe.
        load: returns the settings that the named command makes of recipe and overrides; raises InputError.
        command: the command; None finds it from the recipe's fields.
        script: the file to write; None is RECIPE.sbatch in the current directory, `-` writes none.

    Returns:
        A line that says where the script is or which number the job has; for `-` the script itself.

    Raises:
        InputError: no command can work with the recipe, the job does not fit it, the file holds something else, or
            Slurm refuses the job.
    """
    if str(script) == "-" and submit:
        raise InputError("script", "'-' is printed, not submitted; name a file, or none")
    name, settings = command_of(recipe, load, command)
    check_fit(settings, job)
    text = job.script([*COMMANDS[name].words(absolute(recipe)), *overrides], Path.cwd())
    if str(script) == "-":
        return text.rstrip("\n")
    file = script or Path(f"{Path(recipe).stem}.sbatch")
    write_script(file, text)
    if not submit:
        return f"written {file}; submit it with: sbatch {file}"
    return f"submitted job {submit_script(file)} ({file})"
