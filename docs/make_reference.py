"""docs/reference.md: every command, its fields and what they take, from the classes that check them.

python -m docs.make_reference [FILE]     print the page, or write it
"""

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from shardprune.cli import SETTINGS, app
from shardprune.recipes.commands import RECIPES
from shardprune.recipes.experts import ExpertsRecipe
from shardprune.recipes.identity import identifying_fields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.panels import DescribedField, FieldPanel, panels_of
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.recipes.recover import RecoverRecipe

HEAD = """\
# Recipe reference

Every command, and every field of its recipe. `make docs` writes this page from the classes that check the fields.

A field is given in a YAML file (`--recipe FILE`), as an option of the command, or in Python as an argument of the
recipe's class; an option overrides the file. Names differ only in their dashes: `outlier_m`, `--outlier-m`. An option
that is repeated is a list in the file. A field that takes `true` or `false` is switched on by its option, and off by
the option with `no-` before its name: `--resume`, `--no-resume`. A value that does not fit ends the command with exit
code 2 and one line that names the field, the value and what is allowed, before any work. The file holds plain values,
as JSON has them, at most 1 MB: each field stands in it once, `2:4` is a text, and tags, anchors and dates are not read.

**Same run**: the fields with a `yes` in this column, the model, and the sparse model of `rebuild` identify a run. A
command resumes an output directory that was begun with the same values, and refuses one that was begun with others. All
other fields may change from one attempt to the next. With `propagation: parallel` the number of segments
counts, which is that of `shards` unless `segments` says it; `dtype` counts as what it comes to on the machine.
[pruning.md](pruning.md) says more.

`shardprune --install-completion` teaches your shell (bash, zsh, fish or PowerShell) to complete commands, options and
the values of options that have a fixed choice; `shardprune --show-completion` prints what it would install.
"""
WIDTH = 120
KINDS: dict[Any, str] = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
KINDS[list[str]] = "text, or a list of texts"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts += _command(name, command)
    return "\n".join(parts)


def _panels(command: str) -> list[FieldPanel]:
    return [panel for panel in panels_of(SETTINGS[command]) if panel.listed] if command in SETTINGS else []


def _identity(command: str) -> set[str]:
    """The fields that make two runs of a command the same; none where it has no runs that go on."""
    settings = SETTINGS.get(command)
    if settings in (PruneRecipe, RebuildRecipe, MopRecipe, ExpertsRecipe):
        return identifying_fields(settings) | {"segments", "dtype"}
    return RecoverRecipe.identifying_fields() if settings is RecoverRecipe else set()


def _command(name: str, command: Any) -> Iterator[str]:
    """The section of one command."""
    yield f"## {name}\n"
    further = (SETTINGS[name].__doc__ or "").split("\n\n")[1:] if name in SETTINGS else []
    for paragraph in (*command.help.split("\n\n"), *further):
        yield "\n".join(textwrap.wrap(" ".join(paragraph.split()), WIDTH)) + "\n"
    yield "\n".join(f"    {line}" for line in command.epilog.split("\n\n")[1:]) + "\n"
    python = [f"- in Python: `{name}({RECIPES[name].__name__}(...))`"] if name in RECIPES else []
    yield "\n".join([*_own(name, command), *python]) + "\n"
    for panel in _panels(name):
        yield f"**{panel.title}**\n"
        yield _table(panel.fields, _identity(name))


def _own(name: str, command: Any) -> Iterator[str]:
    """The arguments of a command, and those of its options that stand in no panel of its settings."""
    fields = SETTINGS[name].model_fields if name in SETTINGS else {}
    listed = {field.name for panel in panels_of(SETTINGS[name]) for field in panel.fields} if name in SETTINGS else ()
    for parameter in sorted(command.params, key=lambda parameter: parameter.param_type_name):
        if parameter.hidden or parameter.name in listed:
            continue
        placeholder = parameter.metavar or ""
        if parameter.param_type_name == "option":
            placeholder = f"{parameter.opts[0]} {'' if parameter.is_flag else placeholder}".strip()
        field = f" (`{parameter.name}`)" if parameter.name in fields else ""
        default = "" if parameter.default in (None, False) else f" (default: {parameter.default})"
        text = f"- `{placeholder}`{field}: {_cell(parameter.help)}{default}"
        yield textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _table(fields: Iterable[DescribedField], identity: set[str]) -> str:
    """Fields as a table."""
    rows = [
        [f"`{field.name}`", _option(field), _takes(field), _default(field), _cell(field.description)]
        + (["yes" if field.name in identity else ""] if identity else [])
        for field in fields
    ]
    header = ["field", "option", "takes", "default", "meaning", *(["same run"] if identity else [])]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines) + "\n"


def _option(field: DescribedField) -> str:
    if field.type is dict:
        return "in the file alone"
    switch = "[no-]" if field.default == "on" else ""
    return f"`--{switch}{field.flag}{' ' if field.placeholder else ''}{field.placeholder}`"


def _takes(field: DescribedField) -> str:
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    if field.type is dict:
        return f"fields of [{field.name}](#{field.name})"
    return f"{KINDS[field.type]}, {field.bounds}" if field.bounds else KINDS[field.type]


def _default(field: DescribedField) -> str:
    if field.required:
        return "required"
    if field.value in (None, ()):
        return _cell(field.default or "none")
    return f"`{str(field.value).lower() if isinstance(field.value, bool) else field.default}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page())
    else:
        print(page(), end="")
