"""Every command's `--help`."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from shardprune.cli import SETTINGS, app
from shardprune.recipes.commands import COMMANDS
from shardprune.recipes.panels import PANELS, arguments_of, panels_of

ROOT = Path(__file__).resolve().parents[2]
GROUP = typer.main.get_command(app)
PANELS_OF_COMMANDS = ["Start here", "Prune", "Heal and measure", "Serve", "Plan and run on clusters", "Look"]
WORDS = 24  # of a description at most, allowed values included


def shown(command: str, capsys, monkeypatch, columns: int = 80) -> list[str]:
    """The help of a command as so many columns have it."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")
    context = typer.Context(GROUP, info_name="shardprune")
    if command:
        context = typer.Context(GROUP.commands[command], info_name=command, parent=context)
    context.command.get_help(context)
    return capsys.readouterr().out.splitlines()


def panels(lines: list[str]) -> dict[str, str]:
    """The text of every panel by its title, without frames and line breaks."""
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith("╭"):
            found[title := line.strip("╭─╮ ")] = ""
        elif line.startswith("│"):
            found[title] += f" {line.strip('│ ')}"
    return {title: " ".join(text.split()) for title, text in found.items()}


def parameters(command: str) -> list:
    return [parameter for parameter in GROUP.commands[command].params if not parameter.hidden]


@pytest.mark.parametrize("command", ["", *GROUP.commands])
def test_no_word_is_broken_at_80_columns(command, capsys, monkeypatch):
    narrow, wide = (shown(command, capsys, monkeypatch, columns) for columns in (80, 400))
    assert max(map(len, narrow)) <= 80

    def words(lines: list[str]) -> list[str]:
        return sorted(word for line in lines for word in re.split(r"[\s│╭╮╰╯─]+", line) if word)

    assert words(narrow) == words(wide)
    assert not any("…" in line for line in narrow)


@pytest.mark.parametrize("command", GROUP.commands)
def test_every_parameter_has_a_help_that_stands_in_the_page(command, capsys, monkeypatch):
    page = " ".join(panels(shown(command, capsys, monkeypatch, 400)).values())
    for parameter in parameters(command):
        assert parameter.help
        assert parameter.help in page
        if parameter.param_type_name == "option":
            assert all(name in page for name in (*parameter.opts, *parameter.secondary_opts))
            assert parameter.is_flag or parameter.metavar


@pytest.mark.parametrize("command", SETTINGS)
def test_the_help_of_a_field_says_its_choices_and_default(command):
    texts = {parameter.name: parameter.help for parameter in GROUP.commands[command].params}
    for panel in panels_of(SETTINGS[command]):
        for field in panel.fields:
            if field.type is not dict:
                assert all(choice in texts[field.name] for choice in field.choices)
                assert ("required" in texts[field.name]) == field.required
                assert field.default in (None, "off") or f"default: {field.default}" in texts[field.name]
    for field in arguments_of(SETTINGS[command]):
        assert texts[field.name].startswith(field.description)


@pytest.mark.parametrize("command", SETTINGS)
def test_every_field_stands_in_one_panel_of_the_stated_order(command, capsys, monkeypatch):
    settings = SETTINGS[command]
    fields = [field.name for field in arguments_of(settings)]
    fields += [field.name for panel in panels_of(settings) for field in panel.fields]
    assert sorted(fields) == sorted(settings.model_fields)
    titles = list(panels(shown(command, capsys, monkeypatch)))
    listed = [
        panel.title
        for panel in panels_of(settings)
        if panel.listed and any(field.type is not dict for field in panel.fields)
    ]
    assert titles == ["Arguments", "Options", *listed]
    assert listed == [title for title in PANELS if title in listed]


def test_every_panel_is_used():
    assert {panel.title for settings in SETTINGS.values() for panel in panels_of(settings)} == set(PANELS)


@pytest.mark.parametrize("command", SETTINGS)
def test_descriptions_are_short(command):
    for field in (*arguments_of(SETTINGS[command]), *(f for p in panels_of(SETTINGS[command]) for f in p.fields)):
        assert field.description
        assert field.description[0].isupper() or field.description.split()[0].strip(",:") in (
            *field.choices,
            *("auto", "unstructured", "lambda", "config.json", "lm-eval"),
        )
        assert len(field.description.split()) <= WORDS, field.description


@pytest.mark.parametrize("command", GROUP.commands)
def test_the_example_of_a_command_parses(command, capsys, monkeypatch):
    lines = [line.strip() for line in shown(command, capsys, monkeypatch) if line.strip()]
    (*_, title, example) = lines  # on one line, so that it can be copied
    assert title == "Example:"
    words = shlex.split(example)
    assert words[:2] == ["shardprune", command]
    context = GROUP.commands[command].make_context(command, words[2:])
    assert any(context.params.values())
    for word in words:
        assert not word.endswith(".yaml") or (ROOT / word).is_file()


def test_the_first_steps_parse(capsys, monkeypatch):
    lines = [line.strip() for line in shown("", capsys, monkeypatch)]
    steps = [line for line in lines[lines.index("First steps:") + 1 :] if line]
    commands = [shlex.split(line, comments=True) for line in steps]
    assert [words[1] for words in commands] == ["demo", "plan", "prune", "status"]
    for _, command, *words in commands:
        GROUP.commands[command].make_context(command, words)


def test_commands_stand_in_the_panels_of_the_group(capsys, monkeypatch):
    found = panels(shown("", capsys, monkeypatch, 400))
    assert list(found) == ["Options", *PANELS_OF_COMMANDS]
    for name, command in GROUP.commands.items():
        assert f"{name} {command.help.partition(chr(10))[0]}" in found[command.rich_help_panel]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_row_of_the_table_names_its_recipe_and_story(name):
    command = COMMANDS[name]
    assert command.recipe.command == name
    assert command.story.__name__ == name
    assert command.story.__module__ == command.module
