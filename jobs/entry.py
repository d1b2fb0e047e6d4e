"""Run a command of shardprune from a recipe and options that override it, for all jobs.

    ray job submit --working-dir . --runtime-env ray_configs/runtime_env.yaml -- python -m jobs.prune RECIPE --out OUT

runs on the cluster that it is submitted to; without Ray's job submission, on one of this machine's own.
"""

import sys
from typing import NoReturn

from shardprune.errors import InputError
from shardprune.process import be


def run(command: str) -> NoReturn:
    """Run a command with the recipe and the options that this process was started with.

    Ends the process with the command's exit code; an error is its last line.
    """
    be(lambda: _carry_out(command, sys.argv[1:]))


def _carry_out(command: str, arguments: list[str]) -> int:
    from shardprune.cli import carry_out
    from shardprune.recipes.commands import COMMANDS

    if arguments[:1] and arguments[0] in ("-h", "--help"):
        return carry_out([command, "--help"])
    if not arguments or arguments[0].startswith("-"):
        given = repr(arguments[0]) + " stands in its place" if arguments else "missing"
        raise InputError("recipe", f"{given}; use python -m jobs.{command} RECIPE [OPTIONS]")
    recipe, *overrides = arguments
    return carry_out([*COMMANDS[command].words(recipe), *overrides])
