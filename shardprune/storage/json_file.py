"""JSON as every file and line of it is read and written here: strict in syntax, bounded in size and depth.

Python's own parser takes `NaN`, lets the last of several equal names win, gives out halves of surrogate pairs, and ends
with a RecursionError on deep content. Pydantic's refuses all of these but equal names, so content passes through both.
"""

import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import from_json

from shardprune.storage.malformed import Malformed, shown
from shardprune.storage.text_file import decode

T = TypeVar("T")

LIMIT = 100_000_000  # bytes of a document


def _not_finite(value: Any, info: ValidationInfo) -> Any:
    """Read null as `dump_json` means it; in Python None is a number that is missing."""
    return math.nan if value is None and info.mode == "json" else value


# A number that was measured, and that need not be finite: in files null, where a missing one has no name at all.
Measurement = Annotated[float, BeforeValidator(_not_finite)]
MaybeMeasurement = Annotated[float | None, BeforeValidator(_not_finite)]


def parse_json(content: bytes | str, limit: int = LIMIT, *, infinities: bool = False) -> Any:
    """Return the value of a JSON document, with or without a byte-order mark.

    Args:
        limit: largest size in bytes, or in characters of a text.
        infinities: take the numbers `Infinity` and `-Infinity`, which are no JSON, but which Python writes.

    Raises:
        Malformed: it is larger or no JSON, is nested deeper than 200, holds another number that is not finite,
            half a surrogate pair, or a name twice in one object.
    """
    if len(content) > limit:
        raise Malformed(f"is too large for JSON here: {len(content):,} bytes, at most {limit:,}")
    text = decode(content) if isinstance(content, bytes) else content
    try:
        from_json(text, allow_inf_nan=infinities)
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_infinite)
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(f"is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise Malformed(f"has the name {shown(twice)} twice in one object")
    return values


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Malformed(f"holds a number that is too large: {shown(digits)}")
    return value


def _infinite(word: str) -> float:
    if word == "NaN":
        raise Malformed("is not JSON: it holds NaN")
    return float(word)


def parse_model(content: bytes | str, shape: type[T], limit: int = LIMIT) -> T:
    """Return a JSON document as a pydantic model, a dataclass, or any annotated type such as `dict[str, str]`.

    Types are taken strictly: no number is read from a text, and no truth value as a number.

    Raises:
        Malformed: as `parse_json`, or for the first value that does not fit.
    """
    return fitting(parse_json(content, limit), shape)


def fitting(value: Any, shape: type[T]) -> T:
    """Return a value that `parse_json` has returned as a model, a dataclass, or any annotated type.

    Raises:
        Malformed: names the first value that does not fit, and what is allowed.
    """
    try:
        # As JSON again, since only there pydantic takes a list for a tuple while it takes no text for a number.
        return _adapter(cast(Any, shape)).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise Malformed(_problem(error)) from error


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _problem(error: ValidationError) -> str:
    """Return the first problem of a validation."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"lacks {place}"
    reason = first["msg"].replace("Input should be", "use")
    held = f"holds {shown(first['input'])}"
    return f"{held} as {place}; {reason}" if place else f"{held}; {reason}"


def dump_json(
    value: Any,
    *,
    indent: int | None = None,
    compact: bool = False,
    sort_keys: bool = False,
    infinities: bool = False,
) -> str:
    """Return a value as JSON. Numbers that are not finite become null, since JSON has no word for them.

    Args:
        compact: no spaces between the items.
        infinities: write them as `parse_json` takes them where it is asked to.
    """
    separators = (",", ":") if compact else None
    try:
        return json.dumps(value, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=infinities)
    except ValueError:
        return json.dumps(
            _without_nan(value), indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=False
        )


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
