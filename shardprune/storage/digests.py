"""Digests of data: xxHash's XXH3 with 128 bits.

It reads faster than memory delivers, and tells apart whatever differs by accident: another model, a damaged disk, a
file cut short. It is no proof against forgery; nor would any other be that lies beside the data.
"""

from collections.abc import Iterable, Iterator

import torch
import xxhash
from torch import Tensor

from shardprune.storage.folder import CHUNK
from shardprune.storage.safetensors_file import StoredTensor, bytes_of

StreamedDigest = xxhash.xxh3_128


def digest_of(content: bytes | memoryview) -> str:
    """Return the digest of some bytes as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(content)


def tensor_digest(tensor: Tensor) -> str:
    """Return the digest of a tensor's elements in C order."""
    return digest_of(bytes_of(tensor.detach().cpu().contiguous()))


def pieces_digest(pieces: Iterable[Tensor]) -> str:
    """Return the digest of a tensor that is computed piece by piece, in C order."""
    digest = StreamedDigest()
    for piece in pieces:
        digest.update(bytes_of(piece.detach().cpu().contiguous()))
    return digest.hexdigest()


def stored_digest(stored: StoredTensor) -> str:
    """Return the digest of a tensor in a file, read in parts of at most CHUNK bytes."""
    digest = StreamedDigest()
    for part in parts_of(stored):
        digest.update(bytes_of(part))
    return digest.hexdigest()


def parts_of(stored: StoredTensor) -> Iterator[Tensor]:
    """Yield a tensor in a file in parts of at most CHUNK bytes, each a view of the same buffer (uint8); as a whole, one
    that is made of several."""
    if len(stored.parts()) > 1:
        yield stored.read().reshape(-1).view(torch.uint8)
        return
    size = stored.entry.size
    buffer = torch.empty(min(CHUNK, size), dtype=torch.uint8)
    for start in range(0, max(1, size), CHUNK):
        part = buffer[: size - start]
        stored.read_part(start, part)
        stored.passed(start, part)
        yield part
