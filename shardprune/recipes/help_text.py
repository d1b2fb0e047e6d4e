"""How `--help` looks: panels whose columns line up, examples whose lines stay as they were written.

typer's own panels each have columns of their own, show a type beside every switch and wrap examples anywhere.
"""

import re
import textwrap
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

WIDEST = 100  # columns, beyond which lines are hard to follow
OPTION, VALUE, BORDER = "bold cyan", "yellow", "dim"
GAP, FRAME = 2, 4  # columns between an option and its text, and of a panel's frame
GLUED = 30  # characters up to which a default stays on one line

START, PRUNE, HEAL, PLAN, LOOK = COMMAND_PANELS = (
    "Start here",
    "Prune",
    "Heal and measure",
    "Plan and run on clusters",
    "Look",
)
Row = tuple[Text, str]


class HelpfulCommand(TyperCommand):
    """A command whose help has its panels in line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        arguments = [(Text(placeholder_of(p), OPTION), p.help or "") for p in _arguments(self, ctx)]
        _show(self, ctx, [("Arguments", arguments), *_option_panels(self.get_params(ctx))])


class HelpfulGroup(TyperGroup):
    """A command of commands whose help has its panels in line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[Row]] = {panel: [] for panel in COMMAND_PANELS}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                row = (Text(name, OPTION), " ".join((command.help or "").split("\n\n")[0].split()))
                panels[command.rich_help_panel].append(row)
        _show(self, ctx, [*panels.items(), *_option_panels(self.get_params(ctx))])


def _arguments(command: Any, ctx: Any) -> list[Any]:
    return [p for p in command.get_params(ctx) if p.param_type_name == "argument" and not p.hidden]


def placeholder_of(argument: Any) -> str:
    """What stands for an argument in a help text."""
    return argument.metavar or argument.name.upper()


def _option_panels(parameters: Iterable[Any]) -> list[tuple[str, list[Row]]]:
    """The options by panel: a command's own first, as they are few."""
    panels: dict[str, list[Row]] = {"Options": []}
    for parameter in parameters:
        if parameter.param_type_name == "option" and not parameter.hidden:
            panels.setdefault(parameter.rich_help_panel or "Options", []).append(
                (name_of(parameter), help_of(parameter))
            )
    return list(panels.items())


def name_of(option: Any) -> Text:
    """An option with what stands for its value."""
    names = sorted(option.opts, key=len)
    if option.secondary_opts:  # --x/--no-x
        names = [name.replace("--", "--[no-]", 1) for name in names]
    name = Text(", ".join(names), OPTION)
    return name.append(f" {option.metavar}", VALUE) if option.metavar and not option.is_flag else name


def help_of(option: Any) -> str:
    """An option's text with its default."""
    shown = option.show_default and option.default not in (None, False)
    return f"{option.help or ''} (default: {option.default})" if shown else option.help or ""


def _show(command: Any, ctx: Any, panels: list[tuple[str, list[Row]]]) -> None:
    console = Console(highlight=False)
    console.width = min(console.width, WIDEST)
    console.print(Padding(Text.assemble(("Usage: ", "bold"), _usage(command, ctx)), (1, 1)))
    for paragraph in (command.help or "").split("\n\n"):
        console.print(Padding(Text(" ".join(paragraph.split())), (0, 1, 1, 1)))
    widest = max(len(name) for _, rows in panels for name, _ in rows)
    for title, rows in panels:
        if rows:
            table = _table(rows, widest, console.width - FRAME - widest - GAP)
            console.print(Panel(table, title=title, title_align="left", border_style=BORDER))
    if command.epilog:
        for line in ("", *command.epilog.splitlines()):
            console.print(Text(f" {line}".rstrip()), soft_wrap=True)


def _usage(command: Any, ctx: Any) -> str:
    pieces = [ctx.command_path, "[OPTIONS]"]
    for argument in _arguments(command, ctx):
        name = placeholder_of(argument) + ("..." if argument.nargs == -1 else "")
        pieces.append(name if argument.required else f"[{name}]")
    return " ".join([*pieces, "COMMAND ..."] if isinstance(command, TyperGroup) else pieces)


def _table(rows: list[Row], widest: int, room: int) -> Table:
    table = Table.grid(padding=(0, GAP, 0, 0))
    table.add_column(width=widest, no_wrap=True)
    table.add_column(no_wrap=True)
    for name, text in rows:
        table.add_row(name, Text("\n".join(_wrapped(text, room))))
    return table


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; a short default, or a choice and the bar behind it, stay together."""
    glued = re.sub(r"default: [^);]*", lambda note: _glue(note[0]) if len(note[0]) <= GLUED else note[0], text)
    lines = textwrap.wrap(glued.replace(" | ", "\0| "), width, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _glue(text: str) -> str:
    return text.replace(" ", "\0")
