"""A page of Markdown as the tests see it: blocks of code with their lines, inline code, links, headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import typer
from markdown_it import MarkdownIt

from shardprune.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
OF_THE_REPOSITORY = re.compile(r"(benchmarks|cluster|dev|docs|jobs|ray_configs|shardprune|tests)/[\w./-]*[\w/]")
PARSERS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FILE_NAME = re.compile(r"`([\w./-]+\.\w+)`:$")
COMMAND = r"(?P<command>(?:.*\\\n)*.+)"  # a backslash continues a line
PLAIN = re.compile(rf"^{COMMAND}(?P<shown>)", re.MULTILINE)
PROMPTED = re.compile(rf"^\$ {COMMAND}\n?(?P<shown>(?:(?!\$ ).*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code that begins on `line`, and the `file` that the paragraph before names at its end; the language
    is `console` where it is indented. It does not run behind a comment `<!-- not run: why -->`."""

    language: str
    text: str
    line: int = 1
    file: str | None = None
    runs: bool = False

    def commands(self) -> Iterator[tuple[int, list[str], str]]:
        """The line and the words of every command, and the output that is shown under it behind a prompt `$ `."""
        pattern = PROMPTED if self.text.startswith("$ ") else PLAIN
        for found in pattern.finditer(self.text) if self.language in ("console", "bash") else ():
            text = re.sub(r"\[(.*?)\]", r"\1", found["command"].replace("\\\n", " "))  # [--option] is taken
            if words := shlex.split(text, comments=True):
                yield self.line + self.text.count("\n", 0, found.start()), words, found["shown"]


@dataclass
class Page:
    """A page; `inline` and `links` hold pairs of a line and code or a target."""

    name: str
    text: str
    blocks: list[Block] = field(default_factory=list)
    inline: list[tuple[int, str]] = field(default_factory=list)
    links: list[tuple[int, str]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Page":
        return cls(str(path.relative_to(ROOT)), path.read_text())

    def __post_init__(self) -> None:
        before, kind = "", ""
        for token in MarkdownIt("commonmark").enable("table").parse(self.text):
            line = token.map[0] + 1 if token.map else 0
            if token.type in ("fence", "code_block"):
                language, line = ("console", line) if token.type == "code_block" else (token.info.strip(), line + 1)
                file, runs = FILE_NAME.search(before), not NOT_RUN.search(before)
                self.blocks.append(Block(language, dedent(token.content), line, file and file[1], runs))
                before = ""
            elif token.type in ("html_block", "inline"):
                before, parts = token.content, token.children or []
                self.inline += [(line, part.content) for part in parts if part.type == "code_inline"]
                targets = [part.attrs.get("href") or part.attrs.get("src") for part in parts]
                self.links += [(line, str(target)) for target in targets if target]
                self.headings += [before] if kind == "heading_open" else []
            kind = token.type
