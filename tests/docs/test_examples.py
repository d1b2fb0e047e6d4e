"""Commands that stand elsewhere, in the headers of recipes and scripts and in the help: their words and values are
right. What they do is run by the pages.
"""

import re
import textwrap

import pytest

from tests.docs.blocks import ROOT, Block, Command, commands_of
from tests.docs.programs import job_of_script
from tests.docs.shell import COMMANDS

HEADERS = sorted([*ROOT.glob("jobs/recipes/*.yaml"), *ROOT.glob("cluster/slurm/*.sbatch")])


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_the_header_of_a_recipe_has_its_command(path, shell):
    lines = re.findall(r"^# ((?:shardprune|sbatch) .*)$", path.read_text(), re.MULTILINE)
    assert lines
    for line in lines:
        ((program, *words),) = Command(shell.placed(line), 0).simple
        command, *rest = words if program == "shardprune" else job_of_script(words)
        shell.settings(command, rest)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example(command, shell):
    text = textwrap.dedent(COMMANDS[command].epilog.partition("\n")[2])
    examples = list(commands_of(Block("commands", text, 1)))
    assert examples
    for example in examples:
        (words,) = Command(shell.placed(example.text), 0).simple
        assert words[:2] == ["shardprune", command]
        shell.settings(command, words[2:])
