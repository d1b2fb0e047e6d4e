"""Mixtures of calibration sources."""

from fractions import Fraction

import pytest

from shardprune.errors import InputError
from shardprune.storage.mixture import Part, order_of, parse_parts, windows_of


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("c4", "c4", "1"),
        ("c4:2", "c4", "2"),
        ("self:0.25", "self", "1/4"),
        ("self:runs/a", "self:runs/a", "1"),
        ("self:s3://bucket/a:3", "self:s3://bucket/a", "3"),
        ("texts/a.txt:.5", "texts/a.txt", "1/2"),
        ("a.jsonl:body", "a.jsonl:body", "1"),
        ("a.jsonl:body:2", "a.jsonl:body", "2"),
        ("a.jsonl:2", "a.jsonl", "2"),
        ("hf:name:split:2", "hf:name:split:2", "1"),
        ("hf:name:config:split:text:2", "hf:name:config:split:text", "2"),
    ],
)
def test_a_number_after_a_source_is_its_weight(text, source, weight):
    assert parse_parts([text]) == (Part(source, Fraction(weight)),)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ([], "is empty; use stdlib"),
        (["novel"], "'novel' is no known source; use stdlib, .*self or self:OUT"),
        (["self:"], "'self:' is no known source"),
        (["c4:-1"], "'c4:-1' is no known source"),
        (["c4", "self:0"], "'self:0' weighs nothing; use a weight above 0"),
        (["c4:1", "c4:2"], "'c4' is given twice"),
        (["a.txt", "./a.txt:2"], "'./a.txt' is given twice"),
    ],
)
def test_other_mixtures_are_refused(texts, reason):
    with pytest.raises(InputError, match=f"^calibration: {reason}"):
        parse_parts(texts)


@pytest.mark.parametrize(
    ("weights", "samples", "counts"),
    [
        ((1,), 7, [7]),
        ((1, 1), 7, [4, 3]),
        ((1, 2), 128, [43, 85]),
        ((3, 3, 1), 10, [4, 4, 2]),
        ((Fraction(1, 3), Fraction(2, 3)), 3, [1, 2]),
    ],
)
def test_windows_are_shared_out_by_largest_remainders(weights, samples, counts):
    parts = [Part(f"{place}.txt", Fraction(weight)) for place, weight in enumerate(weights)]
    assert windows_of(parts, samples) == counts


def test_a_source_without_a_window_is_refused():
    with pytest.raises(
        InputError, match=r"^samples: 3 windows leave none for 'b.txt' by the weights; use more of them"
    ):
        windows_of(parse_parts(["a.txt:100", "b.txt"]), 3)


def test_the_windows_of_all_sources_are_spread_evenly():
    order = order_of([6, 3])
    assert order == [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3), (0, 4), (1, 2), (0, 5)]
    for start in range(0, 9, 3):
        assert [part for part, _ in order[start : start + 3]].count(1) == 1
