"""Rendering of a page: tables and plots in one self-contained HTML file."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.resources import files

from jinja2 import Environment, Template
from plotly.offline import get_plotlyjs

from shardprune.printable import printable
from shardprune.report.page.plot import Plot


@dataclass(frozen=True)
class Grid:
    """A table of texts; columns from index `numbers` on are aligned as numbers. If `sortable`, its headings sort it."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers: int = 1
    sortable: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, the verdict, facts in pairs, tables, plots, remarks about missing parts and about the run, the recipe
    as YAML, and the command that it repeats."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    recipe: str | None = None
    verdict: str | None = None
    repeat: str | None = None


def render(title: str, sections: Iterable[Section]) -> str:
    """Render the page as HTML. It fetches nothing: its content security policy forbids it."""
    return _template().render(
        title=title, sections=list(sections), plotly=get_plotlyjs(), version=version("shardprune")
    )


@cache
def _template() -> Template:
    source = (files("shardprune.report.page") / "page.html").read_text("utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
    return page.from_string(source)


def _shown(value: object) -> object:
    """Return what stands on the page for a value: printable text, line by line as it is for the recipe's YAML."""
    if type(value) is not str:  # Markup, as of plots and of plotly itself, is a text of its own kind
        return value
    return "\n".join(printable(line, longest=None) for line in value.split("\n"))
