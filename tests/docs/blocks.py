"""What a page of the documentation holds: blocks of commands, Python, YAML, JSON and output; inline code; links.

Pages are Markdown as CommonMark reads it. A fence may name its language; a block that names none, indented ones
included, is of commands if its first word is a program's, and otherwise what it looks like.
"""

import ast
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
Kind = Literal["commands", "python", "yaml", "json", "output", "unknown"]
LANGUAGES: dict[str, Kind] = {
    "bash": "commands", "sh": "commands", "shell": "commands", "console": "commands",
    "python": "python", "py": "python", "pycon": "python",
    "yaml": "yaml", "json": "json", "jsonl": "json",
    "text": "output", "dockerfile": "output", "html": "output", "diff": "output",
}  # fmt: skip
FILE_NAMES = {
    kind: re.compile(rf"[\w./-]+\.({suffixes})")
    for kind, suffixes in {"yaml": "yaml|yml", "json": "jsonl?", "python": "py"}.items()
}
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
OPERATORS = frozenset({"|", "&&", "||", ";", "&"})
# How the first line of a block without a language begins or reads that is no command: no lower-case word alone at its
# beginning, or punctuation, arrows or columns of a text.
NO_COMMAND = re.compile(r"[^a-z.]|\S+:( |$)|\S+ = |[^'\"]*(, | -> | \()|\S+  +[^#\s]")


@dataclass(frozen=True)
class Block:
    """One block of code, as it stands on a page from `line` on; `file` is the file that the text before says it is."""

    kind: Kind
    text: str
    line: int
    file: str | None = None


@dataclass(frozen=True)
class Command:
    """One command; `line` is where it starts, `shown` what the page says it prints (None where it says nothing)."""

    text: str
    line: int
    shown: str | None = None

    @cached_property
    def simple(self) -> list[list[str]]:
        """The words of each of the commands that pipes and the like put together; redirections are left out.

        What stands in brackets is optional, and is taken.
        """
        text = re.sub(r"(?<=\s)\[([^\]]+)\](?=\s|$)", r"\1", self.text)
        lexer = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, ""  # which would end a word at a # within it
        parts: list[list[str]] = [[]]
        for word in lexer:
            if word.startswith("#"):
                break
            if word in (">", ">>", "<"):
                next(lexer, None)
            elif word in OPERATORS:
                parts.append([])
            else:
                parts[-1].append(word)
        return [part for part in parts if part]


@dataclass
class Page:
    """A page: a file of Markdown, or the comment that a YAML file begins with."""

    name: str
    text: str
    blocks: list[Block] = field(default_factory=list)
    inline: list[tuple[int, str]] = field(default_factory=list)  # line, code
    links: list[tuple[int, str]] = field(default_factory=list)  # line, target
    headings: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Page":
        text = path.read_text()
        if path.suffix == ".yaml":
            lines = text.splitlines()
            end = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
            text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        return cls.parse(name, text)

    @classmethod
    def parse(cls, name: str, text: str) -> "Page":
        page = cls(name, text)
        before: Token | None = None
        heading = False
        for token in MarkdownIt("commonmark").enable("table").parse(text):
            line = token.map[0] + 1 if token.map else 0
            heading = heading or token.type == "heading_open"
            if token.type in ("fence", "code_block"):
                page._add_block(token, before)
                before = None
            elif token.type == "inline":
                before = token
                for child in token.children or []:
                    if child.type == "code_inline":
                        page.inline.append((line, child.content))
                    elif child.type == "link_open":
                        page.links.append((line, str(child.attrs["href"])))
                    elif child.type == "image":
                        page.links.append((line, str(child.attrs["src"])))
                if heading:
                    page.headings.append("".join(child.content for child in token.children or []))
                    heading = False
        return page

    def _add_block(self, token: Token, before: Token | None) -> None:
        assert token.map
        text = textwrap.dedent(token.content)
        language = token.info.split()[0].lower() if token.info.strip() else ""
        kind = LANGUAGES.get(language, "unknown") if language else kind_of(text)
        file = None
        if kind in FILE_NAMES and before and before.content.rstrip().endswith(":"):
            name = [child.content for child in before.children or [] if child.type == "code_inline"][-1:]
            file = name[0] if name and FILE_NAMES[kind].fullmatch(name[0]) else None
        self.blocks.append(Block(kind, text, token.map[0] + 1 + (token.type == "fence"), file))


def kind_of(text: str) -> Kind:
    """What a block that names no language holds."""
    first = next((line for line in text.splitlines() if line.strip() and not line.startswith("# ")), "")
    if first.startswith("$ "):
        return "commands"
    if first.startswith((">>> ", "import ", "from ", "@", "class ", "def ")) or _is_python(text):
        return "python"
    if first.startswith("{") and _is_json(text):
        return "json"
    if _is_yaml(text):
        return "yaml"
    return "output" if _is_output(first) else "commands"


def _is_output(line: str) -> bool:
    return NO_COMMAND.match(line) is not None and not line.startswith("$ ") and not ASSIGNMENT.match(line)


def _is_python(text: str) -> bool:
    """Whether it is Python that does something: calls, assigns."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    does = (ast.Assign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.For, ast.With, ast.If)
    return any(isinstance(it, does) or (isinstance(it, ast.Expr) and isinstance(it.value, ast.Call)) for it in body)


def _is_json(text: str) -> bool:
    try:
        json_values(text)
    except ValueError:
        return False
    return True


def json_values(text: str) -> list[Any]:
    """The values of a block of JSON: one, or one a line.

    Raises:
        ValueError: it is neither.
    """
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


def _is_yaml(text: str) -> bool:
    """Whether it is fields and values, each of the first ones a plain name."""
    if not re.match(r"(#.*\n)*[a-z_]+:( |\n)", text) or re.match(r"(error|warning|exact|parallel):", text):
        return False
    try:
        return isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block: one a line, continued by a backslash; with a prompt `$ `, what follows is its output."""
    lines = block.text.splitlines()
    at = 0
    while at < len(lines):
        start = at
        text = lines[at]
        at += 1
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        if not (start and lines[start - 1].strip()) and _is_output(text):  # Markdown joins neighbouring blocks
            at = next((later for later in range(at, len(lines)) if not lines[later].strip()), len(lines))
            continue
        prompted = text.startswith("$ ")
        text = text.removeprefix("$ ")
        while text.endswith("\\") and at < len(lines):
            text = f"{text[:-1].rstrip()} {lines[at].strip()}"
            at += 1
        shown: list[str] = []
        while prompted and at < len(lines) and not _starts_command(lines, at):
            shown.append(lines[at])
            at += 1
        yield Command(text, block.line + start, "\n".join(shown).strip("\n") or None if prompted else None)


def _starts_command(lines: list[str], at: int) -> bool:
    """Whether output ends before a line: at a prompt, or where Markdown has put the next block into the same one."""
    if lines[at].startswith("$ "):
        return True
    return not lines[at - 1].strip() and re.match(r"(shardprune|python|ray|sbatch) ", lines[at]) is not None
