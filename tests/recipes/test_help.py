"""Every command's `--help` at 80 columns."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from shardprune.cli import app
from shardprune.cluster.slurm.batch import BatchJob
from shardprune.cluster.slurm.commands import COMMANDS
from shardprune.planning.recipe import PlanRecipe
from shardprune.recipes.help_text import COMMAND_PANELS
from shardprune.recipes.panels import panels_of

ROOT = Path(__file__).resolve().parents[2]
GROUP = typer.main.get_command(app)
SETTINGS = {**COMMANDS, "plan": PlanRecipe, "slurm": BatchJob}


def shown(command: str, capsys, monkeypatch) -> list[str]:
    """The help of a command as 80 columns have it."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    context = typer.Context(GROUP, info_name="shardprune")
    if command:
        context = typer.Context(GROUP.commands[command], info_name=command, parent=context)
    context.command.get_help(context)
    return capsys.readouterr().out.splitlines()


def rows(lines: list[str]) -> dict[str, str]:
    """The texts of a help's panels by what they are about."""
    found, name = {}, ""
    for line in lines:
        match = re.fullmatch(r"│ (\S.*?)(?:  +(.*?))? *│|│ {3,}(.*?) *│", line)
        if match and match[1]:
            name = match[1]
            found[name] = match[2] or ""
        elif match:
            found[name] += f" {match[3]}"
    return found


@pytest.mark.parametrize("command", ["", *GROUP.commands])
def test_help_reads_at_80_columns(command, capsys, monkeypatch):
    lines = shown(command, capsys, monkeypatch)
    assert max(map(len, lines)) <= 80
    framed = [line for line in lines if line[:1] in "╭│╰" and line]
    assert {len(line) for line in framed} == {80}
    columns = {match.end() for line in lines if (match := re.match(r"│ \S.*?  +(?=\S)", line))}
    columns |= {match.end() for line in lines if (match := re.match(r"│ {3,}(?=\S)", line))}
    assert len(columns) == 1  # in which all texts start
    assert all(text and text == text.strip() for text in rows(lines).values())


@pytest.mark.parametrize("command", GROUP.commands)
def test_help_names_every_option_and_its_default(command, capsys, monkeypatch):
    lines = shown(command, capsys, monkeypatch)
    texts = {re.split(r"[ ,]", name.replace("[no-]", ""))[0]: text for name, text in rows(lines).items()}
    for parameter in GROUP.commands[command].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert texts[parameter.opts[0]]
            assert parameter.is_flag or parameter.metavar
    titles = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    for panel in panels_of(SETTINGS[command]) if command in SETTINGS else ():
        options = [field for field in panel.fields if field.type is not dict]
        assert (panel.title in titles) == bool(options and panel.listed)
        for field in options if panel.listed else ():
            text = texts[f"--{field.flag}"]
            assert all(choice in text for choice in field.choices)
            assert ("required" in text) == field.required
            assert field.default in (None, "off") or f"default: {field.default}" in text
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("command", GROUP.commands)
def test_the_example_of_a_command_parses(command, capsys, monkeypatch):
    lines = shown(command, capsys, monkeypatch)
    assert [line.strip() for line in lines].count("Example:") == 1
    example = "\n".join(lines[[line.strip() for line in lines].index("Example:") + 1 :])
    words = shlex.split(example.replace("\\\n", " "))
    assert words[:2] == ["shardprune", command]
    context = GROUP.commands[command].make_context(command, words[2:])
    assert any(context.params.values())
    for word in words:
        assert not word.endswith(".yaml") or (ROOT / word).is_file()


def test_the_first_steps_parse(capsys, monkeypatch):
    lines = shown("", capsys, monkeypatch)
    steps = "\n".join(lines[[line.strip() for line in lines].index("First steps:") + 1 :])
    commands = [shlex.split(line, comments=True) for line in steps.replace("\\\n", " ").splitlines() if line.strip()]
    assert [words[1] for words in commands] == ["demo", "plan", "prune", "status"]
    for _, command, *words in commands:
        GROUP.commands[command].make_context(command, words)


def test_every_command_stands_in_a_panel_of_the_help():
    assert all(command.rich_help_panel in COMMAND_PANELS for command in GROUP.commands.values())
