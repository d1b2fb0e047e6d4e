"""The usual losses, against the measurements of docs/quality.md that they sum up."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from shardprune.report.usual_loss import USUAL, Usual, Way, usual_loss

LEAST = 3  # measurements of a range
# The tables with a column for each setting, by the perplexity of the dense model and the calibration text.
BY_SETTING = {26.525: {"same": 2, "self": 3, "other": 4}, 20.314: {"same": 5, "self": 6, "other": 7}}
QUALITY = (Path(__file__).parents[2] / "docs" / "quality.md").read_text()


def table_under(heading, table=0):
    """The cells of a table's header and rows, without backticks, under a heading of docs/quality.md."""
    section = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", QUALITY, re.DOTALL | re.MULTILINE)[1]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    lines = tables[table].replace("`", "").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|--")]


def rows_under(heading, table=0):
    """The cells of a table's rows."""
    return table_under(heading, table)[1:]


def setting(title):
    """The pattern and the share of zeros that the title of a column says."""
    if ":" in title:
        kept, of = map(int, title.split(":"))
        return title, 1 - kept / of
    return "unstructured", float(title.removesuffix(" %")) / 100


def perplexities(cells):
    """The perplexity in each cell that has one, before the share of the gap that is closed."""
    return [float(cell.split(",")[0]) for cell in cells if cell]


def way(row):
    """The way of pruning of a row of "Every part" and the like."""
    row = (
        row.replace("(--quality best)", "").replace("best", "alps reconstruction").replace("balanced", "reconstruction")
    )
    method = "wanda" if "Wanda" in row else "alps" if "alps" in row.lower() else "sparsegpt"
    return method + ", trained" * ("reconstruction" in row)


def measured():
    """All measurements of docs/quality.md by way, pattern and share, each in perplexities of its dense model."""
    found = defaultdict(list)
    for method, _, rebuild, perplexity, *_ in rows_under("A small Llama at 70 %"):
        key = (method + ", rebuilt" * (rebuild != "none"), "unstructured", 0.7)
        found[key].append(float(perplexity) / 25.535)
    for name, *cells in rows_under("Every part, by sparsity and calibration text", 1):
        found[way(name), "unstructured", 0.7] += [value / 26.525 for value in perplexities(cells[:3])]
    texts = defaultdict(set)  # by shares that are not measured on all of them
    for dense, tables in BY_SETTING.items():
        for text, table in tables.items():
            (_, *titles), *rows = table_under("Every part, by sparsity and calibration text", table)
            for name, *cells in rows:
                for title, cell in zip(titles, cells, strict=True):
                    if title.startswith("CPU seconds"):
                        continue
                    key = (way(name), *setting(title))
                    found[key] += [value / dense for value in perplexities([cell])]
                    texts[key] |= {text} if cell else set()
    for name, *cells in rows_under("Allocations"):
        for share, three in ((0.7, cells[:3]), (0.8, cells[3:])):
            found[way(name), "unstructured", share] += [value / 26.525 for value in perplexities(three)]
            there = {text for text, cell in zip(BY_SETTING[26.525], three, strict=True) if cell}
            texts[way(name), "unstructured", share] |= there
    for name, *cells in rows_under("The dial"):
        found[way(name), "unstructured", 0.7] += [value / 26.525 for value in perplexities(cells[:3])]
    for share, kind, _, perplexity, *_ in rows_under("Smaller models"):
        found[kind.split(",")[0].lower(), "", float(share)].append(float(perplexity) / 25.535)
    for name, *cells in rows_under("Fewer experts"):
        if name != "by chance, mean of three" and not name.endswith((", merged", "reconstructed, 50 steps")):
            for share, cell in zip((0.125, 0.25, 0.375, 0.5), cells, strict=False):
                found["experts", "", share] += [value / 34.455 for value in perplexities([cell])]
    one_text = {key for key, measured_on in texts.items() if len(measured_on) == 1}
    return {key: values for key, values in found.items() if len(values) >= LEAST and key not in one_text}


def test_the_ranges_are_those_of_the_measurements():
    found = measured()
    assert {(row.way, row.pattern, row.share) for row in USUAL} == found.keys()
    for row in USUAL:
        values = found[row.way, row.pattern, row.share]
        assert (row.least, row.most) == (round(min(values), 2), round(max(values), 2)), row.name


def test_the_page_has_the_table():
    assert rows_under("What is usual") == [
        [row.name, f"{row.least:.2f}", f"{row.most:.2f}", str(len(values))]
        for row in USUAL
        for values in [measured()[row.way, row.pattern, row.share]]
    ]


@pytest.mark.parametrize(
    ("way", "row"),
    [
        (Way("alps", "unstructured", 0.7), Usual("alps", "unstructured", 0.7, 1.08, 1.67)),
        (Way("alps", "unstructured", 0.7004), Usual("alps", "unstructured", 0.7, 1.08, 1.67)),
        (Way("wanda", "unstructured", 0.65), Usual("wanda", "unstructured", 0.7, 1.73, 2.39)),
        (Way("alps", "unstructured", 0.75), Usual("alps", "unstructured", 0.8, 1.26, 3.48)),
        (Way("alps", "unstructured", 0.9), None),
        (Way("alps", "8:16", 0.5), None),
        (Way("sparsegpt", "2:4", 0.5), Usual("sparsegpt", "2:4", 0.5, 1.06, 1.35)),
        (Way("depth", "", 0.31), Usual("depth", "", 0.3, 1.53, 2.02)),
        (Way("width, trained", "", 0.3), None),
    ],
)
def test_a_share_has_its_row_or_the_next_one_above_it(way, row):
    assert usual_loss(way) == row
    assert row is None or row.is_near(way.share) == (abs(row.share - way.share) < 0.03)
