"""The numbers of a comparison as JSON and CSV, unrounded, for programs that read them."""

import csv
import io
from typing import Any

from shardprune.printable import printable
from shardprune.report.page.comparison import Point
from shardprune.storage.json_file import dump_json

GENERATOR = "shardprune report --compare"
FIRST = (
    *("run", "text", "windows", "seqlen", "tokens_sha256"),
    *("perplexity", "compression", "seconds"),
)
COLUMNS = (
    *FIRST,  # those of every version, by which a file is known
    *("method", "removed", "zeroed", "bytes", "decode_tokens_per_second", "decode_of_dense", "accuracy", "tasks"),
)


def as_json(points: list[Point]) -> str:
    """Return an object with the `generator` and the `models`, one for each model and text with the names of COLUMNS:
    `compression`, `removed` and `zeroed` are fractions, a perplexity that is not finite or a number that was not
    measured is null."""
    return dump_json({"generator": GENERATOR, "models": _records(points)}, indent=2) + "\n"


def as_csv(points: list[Point]) -> str:
    """Return the same with a line of COLUMNS and one for each model and text."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(_records(points))
    return text.getvalue()


def is_generated(name: str, content: bytes) -> bool:
    """Return whether the content of a file with this name is what `as_json` or `as_csv` has written."""
    if name.endswith(".csv"):
        return content.startswith(",".join(FIRST).encode())
    return content.startswith(dump_json({"generator": GENERATOR}, indent=2).removesuffix("\n}").encode())


def _records(points: list[Point]) -> list[dict[str, Any]]:
    return [
        {
            "run": printable(point.name),
            "text": printable(point.text.source.rsplit("/", 1)[-1]),
            "windows": point.text.windows,
            "seqlen": point.text.seqlen,
            "tokens_sha256": point.text.tokens_sha256,
            "perplexity": point.perplexity,
            "compression": point.compression,
            "seconds": point.seconds,
            "method": printable(point.product.method),
            "removed": point.product.removed,
            "zeroed": point.product.zeroed,
            "bytes": point.product.bytes,
            "decode_tokens_per_second": point.product.decode,
            "decode_of_dense": point.product.of_dense,
            "accuracy": point.product.accuracy,
            "tasks": point.product.tasks,
        }
        for point in dict.fromkeys(points)
    ]
