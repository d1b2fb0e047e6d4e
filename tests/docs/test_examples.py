"""Commands that stand elsewhere: in the headers of recipes and scripts, and in the help of every command."""

import re

import pytest

from tests.docs.blocks import ROOT, Command
from tests.docs.programs import run_words
from tests.docs.shell import COMMANDS

HEADERS = sorted([*ROOT.glob("jobs/recipes/*.yaml"), *ROOT.glob("cluster/slurm/*.sbatch")])


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_the_header_of_a_recipe_has_its_command(path, shell):
    lines = re.findall(r"^# ((?:shardprune|sbatch) .*)$", path.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        (words,) = Command(shell.placed(line), 0).simple
        if words[0] == "shardprune":
            shell.settings(words[1], words[2:])
        else:
            run_words(shell, words, Command(line, 0))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_of_a_command_is_one(command, shell):
    example = COMMANDS[command].epilog.removeprefix("Example: ")
    (words,) = Command(shell.placed(example), 0).simple
    assert words[:2] == ["shardprune", command]
    shell.shardprune(words[1:])
