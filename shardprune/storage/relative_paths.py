"""Local paths in the files of an output: relative to it, so that they hold where it is copied with what lies beside it,
and say nothing of the machine that it was made on."""

import itertools
import os
import re
from collections.abc import Callable, Collection
from typing import Any

from shardprune.storage.locations import absolute

LOCAL = re.compile(r"(?:/|~|file://|\.{1,2}(?:/|$))")  # the beginning of a path, not of a name or a URL
RELATIVE = re.compile(r"\.{1,2}(?:/|$)")
WRITTEN = "continuations"  # the field of what models wrote, where what looks like a path is none


def relative_paths(content: Any, out: str) -> Any:
    """Return JSON content with its local paths, names of an object's items included, relative to an output.

    They begin with `.` then. Where the output is on other storage, only the last part of a path stays, of the names of
    an object's items as many as tell them apart. A path that neither begins with `/` nor with `.`, such as
    `texts/a.txt`, stays as it was given, and so do names and URLs.
    """
    remote = "://" in absolute(out)

    def relative(text: str) -> str:
        if not LOCAL.match(text):
            return text
        path = absolute(text)
        if remote:
            return os.path.basename(path)
        found = os.path.relpath(path, absolute(out))
        return found if RELATIVE.match(found) else f"./{found}"

    return _mapped(content, relative)


def absolute_paths(content: Any, out: str) -> Any:
    """Return JSON content that `relative_paths` has made relative to an output with absolute paths."""
    place = absolute(out)
    if "://" in place:
        return content
    return _mapped(content, lambda text: os.path.normpath(f"{place}/{text}") if RELATIVE.match(text) else text)


def _mapped(content: Any, change: Callable[[str], str]) -> Any:
    if isinstance(content, str):
        return change(content)
    if isinstance(content, dict):
        items: dict[str, Any] = {}
        for name, item in content.items():
            changed = change(name)
            items[_apart(name, items) if changed in items else changed] = (
                item if name == WRITTEN else _mapped(item, change)
            )
        return items
    return [_mapped(item, change) for item in content] if isinstance(content, list | tuple) else content


def _apart(path: str, names: Collection[str]) -> str:
    """Return the shortest tail of a path that is none of the names; a number behind it if all are."""
    parts = path.strip("/").split("/")
    tails = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
    numbered = (f"{path} ({number})" for number in itertools.count(2))
    return next(name for name in itertools.chain(tails, numbered) if name not in names)
