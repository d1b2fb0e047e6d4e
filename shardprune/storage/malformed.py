"""The error of every reader of a format, and its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from reprlib import Repr

from shardprune.errors import InputError

SHOWN = 100  # characters of a text in an error

_short = Repr()
_short.maxstring = _short.maxother = SHOWN
_short.maxlevel = 3


class Malformed(ValueError):
    """Content that is not of its format.

    Its text follows the name of the place that the content was read from: "is not JSON: trailing comma at line 3".
    """


@contextmanager
def located(field: str, place: str) -> Iterator[None]:
    """Report malformed content as bad input of a recipe.

    Args:
        field: of the recipe, which names the place.
        place: path or URL of the file, where that helps with a line or a row.

    Raises:
        InputError: for a Malformed inside.
    """
    try:
        yield
    except Malformed as error:
        raise InputError(field, f"{place} {error}") from error


def shown(value: object) -> str:
    """Return a value as Python writes it, shortened to about `SHOWN` characters however large or deep it is."""
    return _short.repr(value)
