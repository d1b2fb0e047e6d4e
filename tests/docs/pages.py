"""A page of Markdown as the tests see it: blocks of code with their lines, inline code, links, headings."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("console", "bash")
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FILE_NAME = re.compile(r"`([\w./-]+\.\w+)`:$")


@dataclass(frozen=True)
class Block:
    """A block of code. One that is indented is of commands; a fence names its language.

    Attributes:
        line: of the page, on which the code begins.
        file: which the paragraph before names at its end.
        runs: False behind a comment `<!-- not run: why -->`.
    """

    language: str
    text: str
    line: int
    file: str | None
    runs: bool


@dataclass(frozen=True)
class Command:
    """A command; `shown` is the output under it, where it stands behind a prompt `$ `."""

    words: list[str]
    line: int
    shown: str


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
        page = cls(name, text)
        before, heading = "", False
        for token in MarkdownIt("commonmark").enable("table").parse(text):
            line = token.map[0] + 1 if token.map else 0
            heading = heading or token.type == "heading_open"
            if token.type in ("fence", "code_block"):
                language = token.info.strip() if token.type == "fence" else COMMANDS[0]
                file = FILE_NAME.search(before)
                code = textwrap.dedent(token.content)
                start = line + (token.type == "fence")
                page.blocks.append(Block(language, code, start, file and file[1], not NOT_RUN.search(before)))
                before = ""
            elif token.type == "html_block":
                before = token.content
            elif token.type == "inline":
                before = token.content
                for child in token.children or []:
                    if child.type == "code_inline":
                        page.inline.append((line, child.content))
                    elif child.type in ("link_open", "image"):
                        page.links.append((line, str(child.attrs.get("href") or child.attrs["src"])))
                if heading:
                    page.headings.append("".join(child.content for child in token.children or []))
                    heading = False
        return page


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block, one a line; a backslash continues a line, `[--option]` on it is taken."""
    lines = block.text.splitlines()
    prompted = block.text.startswith("$ ")
    at = 0
    while at < len(lines):
        start = at
        text = lines[at]
        while text.endswith("\\"):
            at += 1
            text = f"{text[:-1]} {lines[at].strip()}"
        at += 1
        shown = []
        while prompted and at < len(lines) and not lines[at].startswith("$ "):
            shown.append(lines[at])
            at += 1
        words = [word.removeprefix("[") for word in shlex.split(text.removeprefix("$ "), comments=True)]
        words = [word.removesuffix("]") if "[" not in word else word for word in words]
        if words:
            yield Command(words, block.line + start, "\n".join(shown))
