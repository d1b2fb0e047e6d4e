"""Sparse files: a file of tensors, in which sparse ones are a mask and their values, that becomes the original again.

The container is a safetensors file. A tensor NAME is stored as it is, under its own name, or as `NAME:mask` and
`NAME:values` (see `shardprune.storage.bitmask`); compressed parts are bytes, under `NAME:dense`, `NAME:mask` and
`NAME:values` (see `shardprune.storage.byte_planes`). `:header` has the first bytes of the original, up to its data.
The file's metadata says of every tensor what it is, in the order of the original.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.bitmask import count_nonzero, joined, pays, split
from shardprune.storage.byte_planes import compress, decompress
from shardprune.storage.digests import tensor_digest
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import parse_model
from shardprune.storage.malformed import Malformed, located, shown
from shardprune.storage.safetensors_file import (
    DTYPES,
    LARGEST,
    NAMES,
    Entry,
    bytes_of,
    read_header,
    read_tensor,
    write_tensors,
)

KEY = "shardprune_sparse"  # of the record in the metadata of a file
HEADER = ":header"
Compression = Literal["none", "zstd"]


class SparseTensor(BaseModel):
    """A tensor of the original; with `values` it is sparse, and has that many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    values: Annotated[int, Field(ge=0)] | None = None
    digest: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class SparseRecord(BaseModel):
    """The record in a sparse file: the export that it belongs to, and its tensors in the order of the original."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    compression: Compression
    tensors: dict[str, SparseTensor]

    def parts(self, name: str) -> list[str]:
        """Return the names in the file of the parts of a tensor: mask and values, or the whole."""
        if self.tensors[name].values is not None:
            return [f"{name}:mask", f"{name}:values"]
        return [name if self.compression == "none" else f"{name}:dense"]


def write_sparse(
    source: Folder, file: str, target: Folder, name: str, fingerprint: str, compression: Compression
) -> None:
    """Write the file `file` of one folder as the sparse file `name` of another.

    All that is written is in memory at the same time, beside one tensor of the original.

    Raises:
        InputError: the file is no safetensors file.
    """
    entries, _ = read_header(source, file)
    start = min((entry.start for entry in entries.values()), default=source.size(file) or 0)
    parts = {HEADER: torch.frombuffer(bytearray(source.read_range(file, 0, start)), dtype=torch.uint8)}
    described = {}
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        tensor = read_tensor(source, entry)
        own, described[key] = _parts_of(key, tensor, compression)
        parts |= own
    record = SparseRecord(fingerprint=fingerprint, compression=compression, tensors=described)
    write_tensors(target, name, parts, {KEY: record.model_dump_json()})


def _parts_of(name: str, tensor: Tensor, compression: Compression) -> tuple[dict[str, Tensor], SparseTensor]:
    nonzero = count_nonzero(tensor)
    sparse = pays(tensor.numel(), nonzero, tensor.dtype.itemsize)
    described = SparseTensor(
        dtype=NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        values=nonzero if sparse else None,
        digest=tensor_digest(tensor),
    )
    parts = {name: tensor}
    if sparse:
        mask, values = split(tensor)
        parts = {f"{name}:mask": mask, f"{name}:values": values}
    if compression == "zstd":
        parts = {key if sparse else f"{key}:dense": compress(part) for key, part in parts.items()}
    return parts, described


@dataclass(frozen=True)
class SparseFile:
    """A sparse file that is read tensor by tensor. A tensor that is not what was written is an InputError."""

    folder: Folder
    name: str
    record: SparseRecord
    entries: dict[str, Entry]

    @classmethod
    def open(cls, folder: Folder, name: str) -> "SparseFile":
        """Open a sparse file.

        Raises:
            InputError: it is none, or damaged; names the folder's field.
        """
        entries, metadata = read_header(folder, name)
        with located(folder.field, f"{folder.url}/{name}"):
            if KEY not in metadata:
                raise Malformed("is no sparse file: its header has no record of one")
            try:
                record = parse_model(metadata[KEY], SparseRecord)
            except Malformed as error:
                raise Malformed(f"is damaged: its record {error}") from error
            for part in (HEADER, *(part for key in record.tensors for part in record.parts(key))):
                if part not in entries:
                    raise Malformed(f"is damaged: it lacks {shown(part)}")
        return cls(folder, name, record, entries)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as it was.

        Raises:
            InputError: the file is damaged.
        """
        described = self.record.tensors[name]
        with located(self.folder.field, f"{self.folder.url}/{self.name} is damaged: {shown(name)}"):
            tensor = self._tensor(name, described)
            if tensor_digest(tensor) != described.digest:
                raise Malformed("is not what was written")
        return tensor

    def _tensor(self, name: str, described: SparseTensor) -> Tensor:
        if described.dtype not in DTYPES or described.elements > LARGEST // 8:
            raise Malformed(f"is said to be {described.dtype} {shown(described.shape)}")
        dtype, elements = DTYPES[described.dtype], described.elements
        first, *others = self.record.parts(name)
        if described.values is None:
            return self._part(first, elements, dtype).reshape(described.shape)
        mask = self._part(first, -(-elements // 8), torch.uint8)
        return joined(mask, self._part(others[0], described.values, dtype), described.shape)

    def _part(self, name: str, elements: int, dtype: torch.dtype) -> Tensor:
        part = read_tensor(self.folder, self.entries[name])
        if self.record.compression == "zstd":
            return decompress(part, elements, dtype)
        if (part.dtype, part.numel()) != (dtype, elements):
            raise Malformed(f"has {part.numel()} elements of {part.dtype}, and not {elements} of {dtype}")
        return part.reshape(-1)

    def restore(self, target: Folder, name: str) -> None:
        """Write the original file.

        Raises:
            InputError: this one is damaged; nothing is written then.
        """

        def parts() -> Iterator[memoryview]:
            yield bytes_of(read_tensor(self.folder, self.entries[HEADER]))
            for key in self.record.tensors:
                yield bytes_of(self.tensor(key).contiguous())

        target.write(name, parts)


def belongs(folder: Folder, name: str, fingerprint: str) -> bool:
    """Return whether a folder holds a whole sparse file of an export."""
    if not folder.is_file(name):
        return False
    try:
        return SparseFile.open(folder, name).record.fingerprint == fingerprint
    except InputError:
        return False
