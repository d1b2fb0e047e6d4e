"""Local paths in the files of an output: relative to it, so that they hold where it is copied with what lies beside it,
and say nothing of the machine that it was made on."""

import os
import re
from collections.abc import Callable
from typing import Any

from shardprune.storage.locations import absolute

LOCAL = re.compile(r"(?:/|~|file://|\.{1,2}(?:/|$))")  # the beginning of a path, not of a name or a URL
RELATIVE = re.compile(r"\.{1,2}(?:/|$)")


def relative_paths(content: Any, out: str) -> Any:
    """Return JSON content with its local paths, names of an object's items included, relative to an output.

    They begin with `.` then. Where the output is on other storage, only the last part of a path stays. A path that
    neither begins with `/` nor with `.`, such as `texts/a.txt`, stays as it was given, and so do names and URLs.
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
        return {change(name): _mapped(item, change) for name, item in content.items()}
    return [_mapped(item, change) for item in content] if isinstance(content, list | tuple) else content
