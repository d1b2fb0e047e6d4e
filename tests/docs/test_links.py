"""Links and names in README and docs: files and headings are there, options exist.

Nothing is fetched, because tests have no network: of an address outside only the form is checked, and of a paper's
number that it is one of arXiv's.
"""

import re
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.pages import OF_THE_REPOSITORY, PAGES, PARSERS, ROOT, Page

ARXIV = re.compile(r"arXiv[: ]+(\S+?)[\s,;:)\]]|arxiv\.org/\w+/([^\s)]+)", re.IGNORECASE)
OF_OTHER_TOOLS = ("coming-from.md",)  # whose options stand there; tests/docs/test_coming_from.py tells ours apart
# Options of other programs, in the text of pages about them; `_` is in none of ours.
FOREIGN = re.compile(
    r"--\w+_\w*.*|--(exclusive|no-kill|gres|constraint|requeue|signal|num-cpus|generate|batch-size|name|no-name|nv)"
)


@cache
def page_of(path: Path) -> Page:
    return Page.read(path)


def anchors(page: Page) -> set[str]:
    """What GitHub calls the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in page.headings:
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def wrong_link(path: Path, target: str) -> str | None:
    """What is wrong with a link of a page."""
    address = urlsplit(target)
    if address.scheme or address.netloc:
        good = address.scheme == "https" and re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", address.netloc) and " " not in target
        return None if good else "no https address"
    file = (path.parent / address.path).resolve() if address.path else path
    if not file.exists():
        return "no such file"
    if not file.is_relative_to(ROOT):
        return "outside of the repository"
    if address.fragment and address.fragment not in anchors(page_of(file)):
        return f"no such heading; there are {', '.join(sorted(anchors(page_of(file))))}"
    return None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    page = page_of(path)
    wrong = [f"{page.name}:{line}: {target}: {why}" for line, target in page.links if (why := wrong_link(path, target))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_the_text_names_are_there(path):
    """Or come to be by a block of the page, or stand for any name."""
    page = page_of(path)
    made = {block.file for block in page.blocks}
    wrong = [
        f"{page.name}:{line}: {code}"
        for line, code in page.inline
        if OF_THE_REPOSITORY.fullmatch(code) and not (ROOT / code).exists() and code not in made and "NAME" not in code
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_papers_have_numbers_of_arxiv(path):
    for match in ARXIV.finditer(path.read_text() + " "):
        number = match[1] or match[2]
        assert re.fullmatch(r"\d{2}(0[1-9]|1[0-2])\.\d{4,5}(v\d+)?", number), number


@cache
def options(command: str) -> frozenset[str]:
    """The options of a command of shardprune."""
    return frozenset(
        option for parameter in PARSERS[command].params for option in (*parameter.opts, *parameter.secondary_opts)
    ) | {"--help"}


@cache
def all_options() -> frozenset[str]:
    benchmarks = "".join(file.read_text() for file in (ROOT / "benchmarks").rglob("*.py"))
    own = frozenset().union(*(options(command) for command in PARSERS))
    return own | set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', benchmarks)) | {"--install-completion"}


@pytest.mark.parametrize(
    "path", [path for path in PAGES if path.name not in OF_OTHER_TOOLS], ids=lambda path: path.name
)
def test_options_that_the_text_names_exist(path):
    page = page_of(path)
    wrong = []
    for line, code in page.inline:
        words = code.split()
        named = [word.split("=")[0].strip("[]") for word in words if re.match(r"\[?--[a-z]", word)]
        if words[:1] == ["shardprune"] and len(words) > 1 and words[1] in PARSERS:
            known = all_options() if "--" in words else options(words[1])
        elif words[:1] == ["shardprune"] and len(words) > 1 and not words[1].startswith("-"):
            wrong.append(f"{page.name}:{line}: {code}: no command {words[1]!r}")
            continue
        elif named and (words[0].startswith(("-", "[")) or words[0] in PARSERS):
            known = all_options()
        else:
            continue
        wrong += [f"{page.name}:{line}: {code}: {name}" for name in named if name not in known | _foreign(named)]
    assert not wrong, "\n".join(wrong)


def _foreign(names: list[str]) -> set[str]:
    return {name for name in names if FOREIGN.fullmatch(name)}


WRONG = {
    "nowhere.md": "no such file",
    "pruning.md#no-such-section": "no such heading",
    "http://example.org": "no https address",
    "https://example": "no https address",
    "../../elsewhere": "no such file",
}


@pytest.mark.parametrize("target", WRONG)
def test_a_wrong_link_is_found(target):
    assert (wrong_link(ROOT / "docs" / "structure.md", target) or "").startswith(WRONG[target])


def test_a_right_link_is_not():
    for target in ("pruning.md", "pruning.md#exact-and-parallel-propagation", "#mop", "../jobs/recipes"):
        assert wrong_link(ROOT / "docs" / "structure.md", target) is None, target
