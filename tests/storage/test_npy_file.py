"""NumPy's files: the array that was saved, or one line."""

import io

import numpy as np
import pytest

from shardprune.storage.malformed import Malformed
from shardprune.storage.npy_file import parse_npy


def saved(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode() + data


def described(descr: str = "'<i8'", shape: str = "(2, 3)", data: int = 48) -> bytes:
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n", bytes(data))


@pytest.mark.parametrize("shape", [(0,), (5,), (3, 4), (2, 0, 3), (2, 3, 4)])
def test_what_numpy_saves(shape):
    array = np.random.default_rng(0).integers(-9, 9, shape)
    for each in (array, np.asfortranarray(array)):
        read = parse_npy(saved(each), np.int64)
        assert read.dtype == np.int64
        assert read.flags.writeable
        assert read.flags.c_contiguous
        assert np.array_equal(read, array)
    assert np.array_equal(parse_npy(described(), np.int64), np.zeros((2, 3)))


NOT_ONE = r"is not a \.npy array of numbers$"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", NOT_ONE),
        (b"\x93NUMPY", NOT_ONE),
        (b"\x93NUMPY\7\7\0\0", NOT_ONE),
        (b"PK\3\4 and more", "is an archive of arrays"),
        (b"\x80\4\x95", NOT_ONE),  # a pickle
        (header("{'descr': '<i8'}\n"), NOT_ONE),
        (header("not a dictionary\n"), NOT_ONE),
        (header("(" * 5000 + "\n"), NOT_ONE),
        (header("{" * 60000), NOT_ONE),
        (described(shape="(10**15, 8)"), NOT_ONE),
        (
            described(shape="(1000000000000000, 8)"),
            r"is damaged: it has 48 bytes of data, .* of int64 \[10{15}, 8\]",
        ),
        (described(shape="(-2, -3)"), "is damaged: it has 48 bytes"),
        (described(data=47), "is damaged: it has 47 bytes"),
        (described(data=49), "is damaged: it has 49 bytes"),
        (described(shape="(2.0, 3)"), NOT_ONE),
        (described(shape="'x'"), NOT_ONE),
        (described("'|b1'", data=6), r"is bool \[2, 3\]; use int64$"),
        (described("'>i8'"), r"is >i8 \[2, 3\]; use int64$"),
        (described("'|O'"), r"is object \[2, 3\]; use int64$"),
        (described("[('a', '<i8')]"), r"is \[\('a', '<i8'\)\] \[2, 3\]; use int64$"),
        (described("'zzz'"), NOT_ONE),
        (saved(np.zeros((2, 3))), r"is float64 \[2, 3\]; use int64$"),
    ],
    ids=range(22),
)
def test_what_is_none(content, reason):
    with pytest.raises(Malformed, match=f"^{reason}"):
        parse_npy(content, np.int64)
