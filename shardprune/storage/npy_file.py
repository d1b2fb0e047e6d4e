"""NumPy's files of one array of numbers."""

import io
import math

import numpy as np
from numpy.lib import format as npy

from shardprune.storage.malformed import Malformed

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def npy_bytes(array: np.ndarray) -> bytes:
    """Return the content of a file that holds an array."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def parse_npy(content: bytes, dtype: type[np.generic]) -> np.ndarray:
    """Return the array in a file, in C order and in memory of its own.

    Raises:
        Malformed: it is no such file, holds another dtype, or not as many bytes as its shape takes.
    """
    if content.startswith((b"PK\3\4", b"PK\5\6")):
        raise Malformed("is an archive of arrays; use a .npy file of one")
    file = io.BytesIO(content)
    try:
        shape, by_columns, stored = HEADERS[npy.read_magic(file)](file)
    except Exception as error:  # NumPy reads a header with Python's tokenizer and parser, each with errors of its own
        raise Malformed("is not a .npy array of numbers") from error
    if any(type(length) is not int for length in shape):
        raise Malformed(f"is damaged: its shape is {[*shape]}")
    if stored != dtype:
        raise Malformed(f"is {stored} {[*shape]}; use {np.dtype(dtype)}")
    if min(shape, default=0) < 0 or math.prod(shape) * stored.itemsize != len(content) - file.tell():
        raise Malformed(
            f"is damaged: it has {len(content) - file.tell()} bytes of data, which are not those of {stored} {[*shape]}"
        )
    array = np.frombuffer(content, stored, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return array.copy(order="C")
