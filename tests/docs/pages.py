"""A page of Markdown as the tests see it: blocks of code with their lines, inline code, links, headings."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FILE_NAME = re.compile(r"`([\w./-]+\.\w+)`:$")
COMMAND = r"(?P<command>(?:.*\\\n)*.+)"  # a backslash continues a line
PLAIN = re.compile(rf"^{COMMAND}(?P<shown>)", re.MULTILINE)
PROMPTED = re.compile(rf"^\$ {COMMAND}\n?(?P<shown>(?:(?!\$ ).*\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code; its language is what its fence names, and `console` where it is indented.

    Attributes:
        line: of the page, on which the code begins.
        file: the file that the paragraph before names at its end.
        runs: False behind a comment `<!-- not run: why -->`.
    """

    language: str
    text: str
    line: int
    file: str | None
    runs: bool

    def commands(self) -> Iterator[tuple[int, list[str], str]]:
        """The line and the words of every command, and the output that is shown under it behind a prompt `$ `."""
        if self.language not in ("console", "bash"):
            return
        for found in (PROMPTED if self.text.startswith("$ ") else PLAIN).finditer(self.text):
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
        return cls.parse(str(path.relative_to(ROOT)), path.read_text())

    @classmethod
    def parse(cls, name: str, text: str) -> "Page":
        page, before, heading = cls(name, text), "", False
        for token in MarkdownIt("commonmark").enable("table").parse(text):
            line = token.map[0] + 1 if token.map else 0
            if token.type in ("fence", "code_block"):
                indented, file = token.type == "code_block", FILE_NAME.search(before)
                language, start = ("console", line) if indented else (token.info.strip(), line + 1)
                runs = not NOT_RUN.search(before)
                page.blocks.append(Block(language, dedent(token.content), start, file and file[1], runs))
                before = ""
            elif token.type in ("html_block", "inline"):
                before, parts = token.content, token.children or []
                page.inline += [(line, part.content) for part in parts if part.type == "code_inline"]
                targets = [part.attrs.get("href") or part.attrs.get("src") for part in parts]
                page.links += [(line, str(target)) for target in targets if target]
                page.headings += ["".join(part.content for part in parts)] if heading else []
            heading = token.type == "heading_open"
        return page
