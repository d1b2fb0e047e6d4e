"""Tensors compressed by Zstandard, byte plane by byte plane.

All first bytes of the elements stand before all second ones, and so on: the bytes with sign and exponent, which repeat,
are not parted by those of the mantissa, which do not. The codec is pyarrow's, and its frames are standard ones.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.malformed import Malformed
from shardprune.storage.safetensors_file import bytes_of

LEVEL = 3  # higher ones take several times as long for weights that are hardly smaller


def codec() -> Any:
    """Return the codec.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise InputError("compression", "'zstd' needs pyarrow: pip install pyarrow") from error
    return pyarrow.Codec("zstd", compression_level=LEVEL)


def compress(tensor: Tensor) -> Tensor:
    """Return the compressed bytes (uint8 [bytes]) of a contiguous CPU tensor."""
    planes = np.frombuffer(bytes_of(tensor), np.uint8).reshape(-1, tensor.dtype.itemsize).T
    return torch.frombuffer(bytearray(codec().compress(np.ascontiguousarray(planes), asbytes=True)), dtype=torch.uint8)


def decompress(content: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    """Return the elements [elements] that were compressed.

    Raises:
        Malformed: they were others, or the content is damaged.
    """
    size = elements * dtype.itemsize
    try:
        planes = np.frombuffer(codec().decompress(bytes_of(content), decompressed_size=size), np.uint8)
    except (OSError, ValueError, MemoryError) as error:
        raise Malformed(f"cannot be decompressed to {size} bytes") from error
    if planes.size != size:
        raise Malformed(f"has {planes.size} bytes once decompressed, and not {size}")
    elements_first = np.ascontiguousarray(planes.reshape(dtype.itemsize, elements).T)
    return torch.from_numpy(elements_first.reshape(-1)).view(dtype)
