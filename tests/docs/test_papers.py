"""docs/papers.md cites what the code and the other pages name, and CITATION.cff is this version's."""

import re

import yaml

import shardprune
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "papers.md"
ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{5}(?!\d)")
NAMING = re.compile(rf"ar[xX]iv\W+(?:abs/)?{ARXIV.pattern}")


def named_papers() -> dict[str, list[str]]:
    """The files in which each arXiv id occurs."""
    found: dict[str, list[str]] = {}
    for folder, kinds in {
        "shardprune": ("*.py",),
        "docs": ("*.md",),
        "jobs": ("*.py", "*.yaml"),
        ".": ("*.md",),
    }.items():
        for kind in kinds:
            paths = (ROOT / folder).glob(kind) if folder == "." else (ROOT / folder).rglob(kind)
            for path in paths:
                for mention in NAMING.findall(path.read_text()) if path != PAGE else ():
                    found.setdefault(ARXIV.search(mention)[0], []).append(str(path.relative_to(ROOT)))
    return found


def test_every_paper_that_the_code_and_the_pages_name_is_cited():
    named = named_papers()
    assert {"2301.00774", "2306.11695", "2310.05175", "2504.06323", "2408.10631", "2602.06127"} <= set(named)
    cited = set(ARXIV.findall(PAGE.read_text()))
    assert {paper: files for paper, files in named.items() if paper not in cited} == {}


def test_links_and_bibtex_name_the_papers_that_the_tables_cite():
    text = PAGE.read_text()
    tables, bibtex = text.split("## BibTeX of the methods")
    for label, target in re.findall(r"\[arXiv ([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", tables):
        assert label == target
    linked = re.findall(r"\[arXiv ([\d.]+)\]", tables)
    assert len(linked) == len(set(linked)) == len(set(ARXIV.findall(tables)))
    entries = re.findall(r"eprint\s*= \{([\d.]+)\}", bibtex)
    assert len(entries) >= 10
    assert set(entries) <= set(linked)


def test_bibtex_has_the_titles_and_authors_of_the_tables():
    tables, bibtex = PAGE.read_text().split("## BibTeX of the methods")
    checked = 0
    for entry in re.findall(r"@\w+\{\w+,\n(.*?)\n\}", bibtex, re.DOTALL):
        fields = {
            key: " ".join(value.split()) for key, value in re.findall(r"(\w+)\s*= \{(.*?)\}(?:,\n|$)", entry, re.DOTALL)
        }
        if "eprint" not in fields:
            continue
        row = next(line for line in tables.splitlines() if f"[arXiv {fields['eprint']}]" in line)
        names = [" ".join(reversed(name.split(", "))) for name in fields["author"].replace("\\'c", "ć").split(" and ")]
        title = re.sub("[{}]", "", fields["title"])
        assert row.startswith(f"| {', '.join(names)}: *{title}*"), row
        checked += 1
    assert checked >= 10


def test_files_that_the_page_names_exist():
    files = set(re.findall(r"`(shardprune/[\w/]+\.py)`", PAGE.read_text()))
    assert len(files) > 10
    assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == shardprune.__version__
    assert f"version = {{{shardprune.__version__}}}" in PAGE.read_text()
    assert citation["license"] == "Apache-2.0"


def test_the_licence_is_the_whole_apache_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
