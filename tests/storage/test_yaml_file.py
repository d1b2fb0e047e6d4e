"""YAML of recipes: plain values, bounded."""

import math

import pytest

from shardprune.storage.malformed import Malformed
from shardprune.storage.yaml_file import check_depth, dump_yaml, parse_yaml


def test_plain_values():
    text = """
    words: [a, "2:4", 2:4, mixed:8, 2020-01-01, 2020-13-45, 0x_, 1e-4, =, '']
    numbers: [1, -3, 1_000, 0x1F, 1.5, .5, -.inf]
    truth: [true, off, yes, null, ~]
    section: {a: {b: [{c: d}]}}
    """
    values = parse_yaml(text.encode("utf-8-sig"))
    assert values == {
        "words": ["a", "2:4", "2:4", "mixed:8", "2020-01-01", "2020-13-45", "0x_", "1e-4", "=", ""],
        "numbers": [1, -3, 1000, 31, 1.5, 0.5, -math.inf],
        "truth": [True, False, True, None, None],
        "section": {"a": {"b": [{"c": "d"}]}},
    }
    assert parse_yaml(dump_yaml(values).encode()) == values


BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: 2\na: 1", "'a' stands there twice at line 3"),
        ("section: {b: 1, b: 1}", "'b' stands there twice at line 1"),
        ("- {1: 2, '1': 3}", "'1' stands there twice at line 1"),
        (BOMB, "anchors and aliases are not read at line 1"),
        ("a: *b", "anchors and aliases are not read at line 1"),
        ("a: !!int abc", "tags are not read at line 1"),
        ("a: !!python/object/apply:os.system [x]", "tags are not read at line 1"),
        ("a: ! b", "tags are not read at line 1"),
        ("a: " + "[" * 3000, "it is nested deeper than 32 at line 1"),
        ("- " * 100 + "a", "it is nested deeper than 32 at line 1"),
        ('"\\ud800": 1', "half a surrogate pair at line 1"),
        ('a: ["\\ud83d\\ude00"]', "half a surrogate pair at line 1"),
        ('a: "\\U00110000"', r"chr\(\) arg not in range"),
        ("a: [", "expected the node content, but found '<stream end>' at line 1"),
        ("\n\n? [a, b]\n: 1", "found unhashable key at line 3"),
        ("--- 1\n--- 2", "but found another document at line 2"),
        ("a: \x01", "unacceptable character #x0001: special characters are not allowed"),
    ],
    ids=range(17),
)
def test_what_is_refused(text, reason):
    with pytest.raises(Malformed, match=f"^is not YAML: {reason}"):
        parse_yaml(text.encode())


def test_size_and_encoding():
    with pytest.raises(Malformed, match="^is too large for a recipe: 1,000,001 bytes, at most 1,000,000$"):
        parse_yaml(b"#" * 1_000_001)
    with pytest.raises(Malformed, match="^is not UTF-8 text: invalid start byte at byte 3$"):
        parse_yaml(b"a: \xff")


@pytest.mark.parametrize("deep", [b"[" * 5000 + b"]" * 5000, b"- " * 5000 + b"x"])
def test_depth_is_looked_at_before_another_library_reads(deep):
    check_depth(b"a: [[1, {b: 2}]]")
    with pytest.raises(Malformed, match="nested deeper than 32"):
        check_depth(deep)
