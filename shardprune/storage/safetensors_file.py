"""The safetensors format, read and written tensor by tensor on any file system.

A file is eight bytes with the header's length (little-endian), the header in JSON, then the tensors' bytes in C order
without holes. The library's `safe_open` reads single tensors of local files only, and its `save_file` needs all tensors
of a file in memory; here a tensor of a remote file is one ranged read, and a file is written one tensor at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import dump_json, fitting, parse_json
from shardprune.storage.malformed import Malformed, located, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Of no model that is pruned, but perhaps beside its tensors.
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    # Not pruned: weights of FP8 checkpoints, which are read with their scales, and the scales.
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_READ = 64 * 2**10  # bytes of the first read, which contains most headers
HEADER_LIMIT = 100_000_000  # bytes; the limit of the format
LARGEST = 2**63 - 1  # of a size, and of a tensor's bytes: torch counts in signed 64 bits


Size = Annotated[int, Field(ge=0, le=LARGEST)]


class _Described(BaseModel):
    """One tensor as a header describes it; `data_offsets` count from the header's end."""

    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]


@dataclass(frozen=True)
class Entry:
    """The location of one tensor: bytes [start, end) of `file`. With `strides`, its elements lie between those of other
    tensors, the first one at `start`."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None  # in elements

    @property
    def size(self) -> int:
        """The bytes of the tensor itself."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def files(self) -> set[str]:
        """The files that hold it."""
        return {self.file}


def read_header(folder: Folder, name: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the entries and the metadata of a file and check them against its size, as strictly as the library does:
    the tensors' bytes follow one another without holes or overlaps from the header's end to the file's, each as many
    as its shape takes. A name that stands there twice is refused, too.

    Raises:
        InputError: the file is missing, no safetensors file, or truncated; names the folder's field.
    """
    where = f"{folder.url}/{name}"
    size = folder.size(name)
    if size is None:
        raise InputError(folder.field, f"{where} does not exist")
    start = folder.read_range(name, 0, min(size, HEADER_READ)) if size else b""
    length = int.from_bytes(start[:8], "little") if size >= 8 else 0
    if not 2 <= length <= HEADER_LIMIT:
        raise InputError(folder.field, f"{where} is not a safetensors file")
    if 8 + length > size:
        raise InputError(
            folder.field, f"{where} is truncated or not a safetensors file: its header ends after the file"
        )
    if 8 + length > len(start):
        start += folder.read_range(name, len(start), 8 + length)
    with located(folder.field, where):
        try:
            if start[8:9] != b"{":
                raise Malformed("does not begin with {")
            header = parse_json(start[8 : 8 + length], HEADER_LIMIT)
            metadata = header.pop("__metadata__", None)
            metadata = {} if metadata is None else fitting(metadata, dict[str, str])
            described = fitting(header, dict[str, _Described])
        except Malformed as error:
            raise Malformed(f"is not a safetensors file: its header {error}") from error
        for name_of_dtype in {entry.dtype for entry in described.values()} - DTYPES.keys():
            raise Malformed(f"holds {name_of_dtype} tensors; use one of {', '.join(DTYPES)}")
        end = 8 + length + _contiguous(described)
        if end != size:
            raise Malformed(f"is truncated or damaged: it has {size} bytes, its header says {end}")
    return {key: _entry(name, 8 + length, entry) for key, entry in described.items()}, metadata


def _contiguous(described: Mapping[str, "_Described"]) -> int:
    """Return the number of bytes of all tensors.

    Raises:
        Malformed: they overlap or leave a hole, or one has another size than its shape.
    """
    end = 0
    for name, entry in sorted(described.items(), key=lambda item: item[1].data_offsets):
        start, stop = entry.data_offsets
        if start != end or stop < start:
            raise Malformed(
                f"is damaged: the header places {shown(name)} at bytes {start} to {stop}, where {end} are before it"
            )
        if stop - start != _bytes_of(entry):
            raise Malformed(
                f"is damaged: the header gives {shown(name)} {stop - start} bytes, "
                f"which are not those of {entry.dtype} {shown(entry.shape)}"
            )
        end = stop
    return end


def _bytes_of(entry: "_Described") -> int | None:
    """Return the bytes that a shape takes; None for more than a 64-bit number says, even where a later size is 0."""
    size = 1
    for length in (*entry.shape, DTYPES[entry.dtype].itemsize):
        size *= length
        if size > LARGEST:
            return None
    return size


def _entry(file: str, offset: int, described: "_Described") -> Entry:
    start, end = described.data_offsets
    return Entry(file, DTYPES[described.dtype], tuple(described.shape), offset + start, offset + end)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file."""

    folder: Folder
    entry: Entry

    def read(self) -> Tensor:
        """Read the tensor into memory of its own."""
        return read_tensor(self.folder, self.entry)

    def parts(self) -> "tuple[StoredTensor, ...]":
        """Return the tensors, as they are stored, of which `joined` makes this one."""
        return (self,)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Return the tensor, on the device of its parts."""
        return parts[0]

    def read_elements(self, start: int, stop: int) -> Tensor:
        """Read elements `start` to `stop`, counted in C order, into memory of their own [stop - start]."""
        return read_elements(self.folder, self.entry, start, stop)

    def read_part(self, start: int, buffer: Tensor) -> None:
        """Fill a buffer of bytes (uint8, contiguous, on the CPU) with the tensor's from `start` on."""
        if self.entry.strides is not None:
            own = read_tensor(self.folder, self.entry).view(-1).view(torch.uint8)
            buffer.copy_(own[start : start + buffer.numel()])
            return
        self.folder.read_into(self.entry.file, self.entry.start + start, bytes_of(buffer))

    def passed(self, start: int, part: Tensor) -> None:
        """Take note of bytes of the tensor, from `start` on, that `read_part` has read; called in their order."""


def read_tensor(folder: Folder, entry: Entry) -> Tensor:
    """Read one tensor into memory of its own."""
    return read_elements(folder, entry, 0, math.prod(entry.shape)).reshape(entry.shape)


def read_elements(folder: Folder, entry: Entry, start: int, stop: int) -> Tensor:
    """Read elements `start` to `stop` of a tensor, counted in C order, into memory of their own [stop - start]."""
    if entry.strides is not None:
        held = torch.empty((entry.end - entry.start) // entry.dtype.itemsize, dtype=entry.dtype)
        folder.read_into(entry.file, entry.start, bytes_of(held))
        return held.as_strided(entry.shape, entry.strides).reshape(-1)[start:stop].clone()
    elements = torch.empty(stop - start, dtype=entry.dtype)
    if start < stop:
        folder.read_into(entry.file, entry.start + start * entry.dtype.itemsize, bytes_of(elements))
    return elements


Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_tensors(folder: Folder, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors that are in memory."""
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_pieces(folder, name, shapes, lambda key: [tensors[key]], metadata)


def write_pieces(
    folder: Folder,
    name: str,
    shapes: Shapes,
    pieces: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a file of tensors that are computed piece by piece, in C order, each when it is written."""

    def content(key: str) -> Iterator[memoryview]:
        for piece in pieces(key):
            yield bytes_of(piece.detach().cpu().contiguous())

    _write(folder, name, shapes, metadata, content)


def _write(
    folder: Folder,
    name: str,
    shapes: Shapes,
    metadata: Mapping[str, str],
    content: Callable[[str], Iterable[memoryview]],
) -> None:
    # Wide dtypes first, so that every tensor is aligned to its item size.
    order = sorted(shapes, key=lambda key: (-shapes[key][0].itemsize, key))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for key in order:
        dtype, shape = shapes[key]
        size = math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = dump_json(header, compact=True).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for key in order:
            yield from content(key)

    folder.write(name, parts)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
