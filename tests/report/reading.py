"""What stands on the page of a report, and the tensors that it is about."""

import html
import json
import re

from safetensors.torch import load_file


def page_of(out, name="report.html"):
    return (out / name).read_text()


def figures(page):
    """The figures on a page by title, and what its tables and facts say."""
    titles = [html.unescape(title) for title in re.findall(r"<h3>(.*?)</h3>", page)]
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return dict(zip(titles, (json.loads(text) for text in found), strict=True))


def cells(page):
    return [html.unescape(cell) for cell in re.findall(r"<(?:td|dd)[^>]*>(.*?)</(?:td|dd)>", page)]


def projections(out):
    """All weights of projections by layer and name, from the files of a checkpoint."""
    tensors = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    for name, value in tensors.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*_proj)\.weight", name):
            yield int(match[1]), match[2].rsplit(".", 1)[-1].removesuffix("_proj"), value
