"""The console that everything is printed on: text is text, whoever wrote it."""

from typing import Any

from rich.console import Console
from rich.text import Text

from shardprune.printable import printable


class PlainConsole(Console):
    """A console on which texts, those in the cells and titles of tables included, are one printable line each: they
    have no markup, no emoji codes, and no escapes that a terminal would follow."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, **settings)

    def render_str(self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any) -> Text:
        return Text(printable(text), style=style, justify=justify, overflow=overflow)
