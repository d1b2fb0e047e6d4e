"""Changes to well-formed files of JSON and text: each takes the content and a generator, and returns other content."""

import json
import math
import random
from collections.abc import Callable
from typing import Any

DEEP = 100_000  # brackets in one another


class Pairs(list[tuple[Any, Any]]):
    """The pairs of a JSON object, in which a name may come twice."""


class Raw(str):
    """Text that stands in JSON as it is."""


ODD_TEXTS = (
    "",
    " ",
    "x",
    "0",
    "nan",
    "None",
    "a" * 20_000,
    "../../../etc/passwd",
    "/etc/passwd",
    "line\nbreak",
    "bell\a and \x1b[31mred\x1b[0m \x1b]0;title\a",
    "\x00",
    "\ud800",
    "caf\u00e9 \u202e right to left \U0001f600",
    "s3://user:SECRET@bucket/x?key=SECRET",
    "https://SECRET:SECRET@x/y",
    "{{ 7 * 7 }}",
    "%s %d {0} {x!r}",
)
ODD_NUMBERS = (
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    -(2**63) - 1,
    2**64,
    10**9,
    10**40,
    0.5,
    -0.0,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    Raw("1e999"),
    Raw("9" * 5000),
    Raw("0x10"),
    Raw("01"),
)
ODD_OTHERS = (None, True, False, [], Pairs(), [None], [[]], [1, "x"], Pairs([("a", 1)]), Pairs([("", Pairs())]))


def odd(draw: random.Random) -> Any:
    """A value that is rarely meant."""
    if draw.random() < 0.04:
        return Raw("[" * DEEP + "]" * DEEP)
    return draw.choice(draw.choice((ODD_TEXTS, ODD_NUMBERS, ODD_OTHERS)))


def parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


def written(value: Any) -> str:
    """JSON that may have what no writer of JSON writes: names twice, numbers without end."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(name))}: {written(item)}" for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(item) for item in value) + "]"
    return json.dumps(value)


# -- JSON -------------------------------------------------------------------------------------------------------


def change_tree(tree: Any, draw: random.Random, nearby: float = 0.4) -> Any:
    """Change one place of a JSON value; `nearby` is the share of changes to a value of the same type."""
    holders = _holders(tree)
    if not holders or draw.random() < 0.03:
        return odd(draw)
    holder = draw.choice(holders)
    at = draw.randrange(len(holder))
    pair = isinstance(holder, Pairs)
    value = holder[at][1] if pair else holder[at]
    kind = draw.random()
    if kind < nearby:
        changed = _near(value, draw)
    elif kind < nearby + 0.3:
        changed = odd(draw)
    elif kind < nearby + 0.4:
        del holder[at]
        return tree
    elif pair and kind < nearby + 0.47:
        holder.insert(
            draw.randrange(len(holder) + 1), (holder[at][0], draw.choice((value, odd(draw), _near(value, draw))))
        )
        return tree
    elif pair and kind < nearby + 0.53:
        holder.insert(at, (draw.choice(ODD_TEXTS), odd(draw)))
        return tree
    else:
        changed = draw.choice(([value], Pairs([("x", value)]), str(value)))
    holder[at] = (holder[at][0], changed) if pair else changed
    return tree


def _holders(value: Any) -> list[list[Any]]:
    """All objects and lists that have anything in them."""
    found: list[list[Any]] = []
    if isinstance(value, list) and value:
        found.append(value)
        for item in value:
            found += _holders(item[1] if isinstance(value, Pairs) else item)
    return found


def _near(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return draw.choice((True, False, None))
    if isinstance(value, int):
        return draw.choice((value + 1, value - 1, -value, 2 * value, 0, value // 2, value * 10**6, float(value)))
    if isinstance(value, float) and math.isfinite(value):
        return draw.choice((-value, value * 1e6, 0.0, 1 - value, int(value), float("nan")))
    if isinstance(value, str):
        return draw.choice((value + "x", value[:-1], value.upper(), value[::-1], f" {value}", f"../{value}"))
    if isinstance(value, float):
        return -value
    return draw.choice((value + value, value[:1], value[1:], list(reversed(value))))


def json_file(content: bytes, draw: random.Random) -> bytes:
    """Change a JSON file: most often a value, sometimes its bytes."""
    if draw.random() < 0.2:
        return text_file(content, draw)
    tree = parsed(content.decode())
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        tree = change_tree(tree, draw)
    return written(tree).encode()


def json_lines(content: bytes, draw: random.Random) -> bytes:
    """Change one line of a file of JSON lines, or its bytes."""
    if draw.random() < 0.25:
        return text_file(content, draw)
    lines = content.decode().splitlines()
    at = draw.randrange(len(lines))
    if draw.random() < 0.2:
        lines.insert(at, draw.choice(("", "null", "{", "[1]", '"x"', "nan", "\ufeff{}", "[" * DEEP, "1" * 5000)))
    else:
        lines[at] = written(change_tree(parsed(lines[at]), draw))
    return "\n".join([*lines, ""]).encode(errors="surrogatepass")


# -- bytes ------------------------------------------------------------------------------------------------------


def _cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 20))):
        if changed:
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def _inserted(content: bytes, draw: random.Random) -> bytes:
    pieces = (
        b"\x00",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\x1b[2J",
        b"\r",
        b"\n\n",
        b"[" * DEEP,
        b'"',
        b"{",
        b"\x85",
        b"a" * 10**6,
    )
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(pieces) + content[at:]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut,
    _flipped,
    _flipped,
    _inserted,
    _inserted,
    lambda content, draw: b"",
    lambda content, draw: content + content,
    lambda content, draw: b" \n" * draw.choice((1, 10**6)),
)


def byte_file(content: bytes, draw: random.Random) -> bytes:
    """Change any file's bytes."""
    return draw.choice(BYTES)(content, draw)


def text_file(content: bytes, draw: random.Random) -> bytes:
    """Change a text's bytes, or its encoding."""
    if draw.random() < 0.7:
        return byte_file(content, draw)
    encoding = draw.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"))
    return (content.decode() + "\u00e9").encode(encoding)
