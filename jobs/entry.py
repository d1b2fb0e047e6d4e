"""Run a command of shardprune from a recipe and options that override it, for all jobs.

    ray job submit --working-dir . --runtime-env ray_configs/runtime_env.yaml -- python -m jobs.prune RECIPE --out OUT

runs on the cluster that it is submitted to; without Ray's job submission, on one of this machine's own.
"""

import sys

from shardprune.cli import main
from shardprune.recipes.commands import COMMANDS


def run(command: str) -> None:
    """Run a command with the recipe and the options that this process was started with.

    Ends the process with the command's exit code; an error is its last line.
    """
    arguments = sys.argv[1:]
    if arguments[:1] and arguments[0] in ("-h", "--help"):
        main([command, "--help"])
    if not arguments or arguments[0].startswith("-"):
        given = repr(arguments[0]) + " stands in its place" if arguments else "missing"
        print(f"error: recipe: {given}; use python -m jobs.{command} RECIPE [OPTIONS]", file=sys.stderr)
        sys.exit(2)
    recipe, *overrides = arguments
    main([*COMMANDS[command].words(recipe), *overrides])
