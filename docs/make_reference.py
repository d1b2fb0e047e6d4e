"""docs/reference.md: every command, its fields and what they take, from the classes that check them.

python -m docs.make_reference [FILE]     print the page, or write it
"""

import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

from shardprune import __all__ as public
from shardprune.cli import app
from shardprune.cluster.slurm.batch import BatchJob
from shardprune.cluster.slurm.commands import COMMANDS
from shardprune.planning.recipe import PlanRecipe
from shardprune.recipes.help_text import help_of, name_of, placeholder_of
from shardprune.recipes.identity import identifying_fields
from shardprune.recipes.mop import MopRecipe
from shardprune.recipes.panels import DescribedField, FieldPanel, panels_of
from shardprune.recipes.prune import PruneRecipe, RebuildRecipe
from shardprune.recipes.recover import RecoverRecipe
from shardprune.recipes.settings import Settings

HEAD = """\
# Recipe reference

Every command, and every field of its recipe. `make docs` writes this page from the classes that check the fields.

A field is given in a YAML file (`--recipe FILE`), as an option of the command, or in Python as an argument of the
recipe's class; an option overrides the file. Names differ only in their dashes: `outlier_m`, `--outlier-m`. An option
that is repeated is a list in the file. A field that takes `true` or `false` is switched on by its option, and off by
the option with `no-` before its name: `--resume`, `--no-resume`. A value that does not fit ends the command with exit
code 2 and one line that names the field, the value and what is allowed, before any work.

**Same run**: the fields with a `yes` in this column, the model, and the sparse model of `rebuild` say which run it is.
An output directory is resumed by a command that has the same values there, and refused to one whose values make another
result. All other fields may change from one attempt to the next. With `propagation: parallel` the number of segments
counts, which is that of `shards` unless `segments` says it; `dtype` counts as what it comes to on the machine.
[pruning.md](pruning.md) says more.

`shardprune --install-completion` teaches your shell (bash, zsh, fish or PowerShell) to complete commands, options and
the values of options that have a fixed choice; `shardprune --show-completion` prints what it would install.
"""
SETTINGS: dict[str, type[Settings]] = {**COMMANDS, "plan": PlanRecipe, "slurm": BatchJob}
WIDTH = 120
KINDS: dict[Any, str] = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
KINDS[list[str]] = "text, or a list of texts"
Group = type[Settings]


def page() -> str:
    """The whole page."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    users = {group: names for group, names in _users(commands).items() if len(names) > 1}
    parts = [HEAD, "## Commands\n"]
    for name, command in commands.items():
        parts += _command(name, command, set(users))
    parts.append("## Groups that several commands share\n")
    for group, names in users.items():
        parts += _shared_group(group, names)
    return "\n".join(parts)


def _users(commands: Iterable[str]) -> dict[Group, list[str]]:
    """The groups of fields, each with the commands that have fields of it."""
    users: dict[Group, list[str]] = {}
    for name in commands:
        for group in dict.fromkeys(field.group for panel in _panels(name) for field in panel.fields):
            users.setdefault(group, []).append(name)
    return users


def _panels(command: str) -> list[FieldPanel]:
    return [panel for panel in panels_of(SETTINGS[command]) if panel.listed] if command in SETTINGS else []


def _identity(command: str) -> set[str]:
    """The fields that make two runs of a command the same; none where it has no runs that go on."""
    settings = SETTINGS.get(command)
    if settings in (PruneRecipe, RebuildRecipe, MopRecipe):
        return identifying_fields(settings) | {"segments", "dtype"}
    return RecoverRecipe.identifying_fields() if settings is RecoverRecipe else set()


def _command(name: str, command: Any, shared: set[Group]) -> Iterator[str]:
    """The section of one command."""
    yield f"### {name}\n"
    further = (SETTINGS[name].__doc__ or "").split("\n\n")[1:] if name in SETTINGS else []
    for paragraph in (*command.help.split("\n\n"), *further):
        yield "\n".join(textwrap.wrap(" ".join(paragraph.split()), WIDTH)) + "\n"
    yield "\n".join(f"  {line}" for line in command.epilog.splitlines()[2:]) + "\n"
    recipe = SETTINGS[name].__name__ if name in SETTINGS else ""
    yield (
        "\n".join([*_own(name, command), *([f"- in Python: `{name}({recipe}(...))`"] if recipe in public else [])])
        + "\n"
    )
    for panel in _panels(name):
        yield from _panel(panel, _identity(name), shared)


def _own(name: str, command: Any) -> Iterator[str]:
    """The arguments of a command, and those of its options that stand in no panel of its settings."""
    fields = SETTINGS[name].model_fields if name in SETTINGS else {}
    listed = {field.name for panel in _panels(name) for field in panel.fields}
    for parameter in sorted(command.params, key=lambda parameter: parameter.param_type_name):
        if parameter.hidden or parameter.name in listed:
            continue
        is_argument = parameter.param_type_name == "argument"
        shown = placeholder_of(parameter) if is_argument else name_of(parameter)
        field = f" (`{parameter.name}`)" if parameter.name in fields else ""
        text = f"- `{shown}`{field}: {_cell(help_of(parameter))}"
        yield textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _panel(panel: FieldPanel, identity: set[str], shared: set[Group]) -> Iterator[str]:
    """The fields of one panel: those of shared groups by a link."""
    own = [field for field in panel.fields if field.group not in shared]
    links = [
        _link(group, {field.name for field in panel.fields if field.group is group})
        for group in dict.fromkeys(field.group for field in panel.fields)
        if group in shared
    ]
    if not own:
        yield f"**{panel.title}**: {'; '.join(links)}\n"
        return
    yield f"**{panel.title}**\n"
    yield _table(own, identity)
    if links:
        yield f"and {'; '.join(links)}\n"


def _link(group: Group, names: set[str]) -> str:
    missing = [f"`{name}`" for name in _declared(group) if name not in names]
    without = f" but for {', '.join(missing)}" if missing else ""
    return f"[{group.__name__}](#{group.__name__.lower()}){without}"


def _declared(group: Group) -> list[str]:
    return [name for name in group.__annotations__ if name in group.model_fields]


def _shared_group(group: Group, commands: list[str]) -> Iterator[str]:
    """The section of a group, with what is the same in all commands that have it."""
    yield f"### {group.__name__}\n"
    text = f'"{group.__doc__}" of {_listed([f"[{name}](#{name})" for name in commands])}.'
    yield textwrap.fill(text, WIDTH) + "\n"
    fields = {
        field.name: field
        for name in commands
        for panel in _panels(name)
        for field in panel.fields
        if field.group is group
    }
    marked = [_identity(name) & set(fields) for name in commands if _identity(name)]
    assert all(names == marked[0] for names in marked), group
    yield _table([fields[name] for name in _declared(group)], marked[0] if marked else set())


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _table(fields: Iterable[DescribedField], identity: set[str]) -> str:
    """Fields as a table."""
    rows = [
        [f"`{field.name}`", _option(field), _takes(field), _default(field), _cell(field.description)]
        + (["yes" if field.name in identity else ""] if identity else [])
        for field in fields
    ]
    header = ["field", "option", "takes", "default", "what it is", *(["same run"] if identity else [])]
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
    return f"`{str(field.value).lower() if isinstance(field.value, bool) else field.value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page())
    else:
        print(page(), end="")
