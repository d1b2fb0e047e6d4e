"""JSON as strict as its standard, and bounded."""

import json
import math
from dataclasses import dataclass

import pytest
from pydantic import BaseModel

from shardprune.errors import InputError
from shardprune.storage.json_file import dump_json, fitting, parse_json, parse_model
from shardprune.storage.malformed import Malformed, located

PLAIN = {"a": [1, -2.5, True, None, "text, \u2028, \U0001f600"], "b": {"c": {}}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_values_in_every_encoding_with_a_mark(encoding):
    for text in (json.dumps(PLAIN), json.dumps(PLAIN, ensure_ascii=False)):
        assert parse_json(text.encode(encoding)) == parse_json(text) == PLAIN


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON: EOF"),
        (b"[1,]", "is not JSON: trailing comma at line 1"),
        (b'{"a": 1} x', "is not JSON: trailing characters"),
        (b"[" * 100_000, "is not JSON: recursion limit exceeded"),
        (b"[" * 500 + b"]" * 500, "is not JSON: recursion limit exceeded"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "is not JSON: recursion limit exceeded"),
        (b'{"a": NaN}', "is not JSON: expected value"),
        (b"[-Infinity]", "is not JSON: invalid number"),
        (b"[1e999]", "holds a number that is too large: '1e999'"),
        (b"9" * 5000, "is not JSON: number out of range"),
        (b'{"a": 1, "b": 2, "a": 1}', "has the name 'a' twice in one object"),
        (b'[{"b": {"x": 1, "x": 2}}]', "has the name 'x' twice in one object"),
        (rb'"\ud800"', "is not JSON: unexpected end of hex escape"),
        (rb'"\ud800 and \udc00"', "is not JSON: .*hex escape"),
        (b'"\xed\xa0\x80"', "is not UTF-8 text: invalid continuation byte at byte 1"),
        (b"\xff\xfe[", "is not UTF-16 text: truncated data at byte 2"),
        (b'"a\nb"', "is not JSON: control character"),
        (b" " * 100_000_001, "is too large for JSON here: 100,000,001 bytes, at most 100,000,000"),
    ],
    ids=range(18),
)
def test_what_is_no_json(content, reason):
    with pytest.raises(Malformed, match=f"^{reason}"):
        parse_json(content)


def test_infinite_numbers_where_they_are_asked_for():
    value = {"a": [0.0, math.inf], "b": -math.inf}
    text = dump_json(value, infinities=True)
    assert text == json.dumps(value)
    assert parse_json(text, infinities=True) == parse_json(text.encode(), infinities=True) == value
    with pytest.raises(Malformed, match="^is not JSON: "):
        parse_json(text)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[NaN]", "is not JSON: it holds NaN"),
        (b"[1e999]", "holds a number that is too large"),
        (b"[inf]", "is not JSON"),
    ],
)
def test_infinite_numbers_are_no_others(content, reason):
    with pytest.raises(Malformed, match=f"^{reason}"):
        parse_json(content, infinities=True)


def test_the_place_and_the_field_of_an_error():
    with pytest.raises(InputError, match="^data: 'x.jsonl' line 3 is not JSON: trailing comma"):  # noqa: SIM117
        with located("data", "'x.jsonl' line 3"):
            parse_json("[1,]")


class Shape(BaseModel):
    layers: int
    share: float = 0.5
    kept: tuple[int, ...] = ()


@dataclass
class Point:
    x: float


def test_documents_as_models():
    assert parse_model('{"layers": 3, "share": 1, "kept": [1, 2]}', Shape) == Shape(layers=3, share=1.0, kept=(1, 2))
    assert parse_model(b'{"x": 2}', Point) == Point(2.0)
    assert fitting({"a": "b"}, dict[str, str]) == {"a": "b"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "lacks layers"),
        ('{"layers": "3"}', "holds '3' as layers; use a valid integer"),
        ('{"layers": true}', "holds True as layers; use a valid integer"),
        ('{"layers": 3, "kept": [1, 2.5]}', r"holds 2\.5 as kept\.1; use a valid integer"),
        ("[]", r"holds \[\]; use an object"),
        (json.dumps({"layers": "x" * 10**6}), r"holds 'x{47}\.\.\.x{48}' as layers; use a valid integer"),
    ],
)
def test_the_first_value_that_does_not_fit(text, reason):
    with pytest.raises(Malformed, match=f"^{reason}$"):
        parse_model(text, Shape)


def test_numbers_that_json_cannot_say_are_null():
    written = dump_json({"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": True}, indent=1)
    assert parse_json(written) == {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": True}
    assert dump_json({"b": [1], "a": 2.0}, compact=True, sort_keys=True) == '{"a":2.0,"b":[1]}'
