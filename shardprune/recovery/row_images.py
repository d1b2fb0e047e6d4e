"""The images that rows of tokens show."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardprune.storage.json_file import dump_json, parse_json


class ImageFile(NamedTuple):
    """An image by its name in a folder, and its size in pixels."""

    folder: str
    name: str
    width: int
    height: int

    @property
    def url(self) -> str:
        return f"{self.folder.rstrip('/')}/{self.name}"


@dataclass(frozen=True, eq=False)
class RowImages:
    """The images of rows.

    Attributes:
        files: those that any row shows.
        shown: int64 [shown], in the order of the rows and of their tokens, indices into `files`.
        starts: int64 [rows + 1], the first of each row, and their number at the end.
    """

    files: tuple[ImageFile, ...]
    shown: Tensor
    starts: Tensor

    @property
    def most(self) -> int:
        """The most images that a row shows."""
        return max(self.starts.diff().tolist(), default=0)

    @classmethod
    def of(cls, files: Sequence[ImageFile], rows: Sequence[Sequence[int]]) -> "RowImages":
        """Return the images of rows, each given by the indices of its files."""
        counts = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
        return cls(
            tuple(files), torch.tensor([one for row in rows for one in row], dtype=torch.int64), counts.cumsum(0)
        )

    def of_rows(self, rows: Sequence[int]) -> list[ImageFile]:
        """Return the images of some rows, in their order."""
        return [self.files[one] for row in rows for one in self.row(row)]

    def select(self, rows: Sequence[int]) -> "RowImages":
        """Return the images of some rows as those of all rows."""
        return RowImages.of(self.files, [self.row(row) for row in rows])

    def digest(self) -> str:
        """Return the SHA-256 of the images' names and sizes, and of which row shows which; folders may move."""
        files = [(file.name, file.width, file.height) for file in self.files]
        content = hashlib.sha256(dump_json([files, self.shown.tolist(), self.starts.tolist()]).encode())
        return content.hexdigest()

    def as_text(self) -> str:
        """Return the files as a text, which `parsed` reads."""
        return dump_json(self.files)

    @classmethod
    def parsed(cls, files: str, shown: Tensor, starts: Tensor) -> "RowImages":
        """Return the images whose files are given as a text."""
        return cls(tuple(ImageFile(*file) for file in parse_json(files, len(files))), shown, starts)

    def row(self, row: int) -> list[int]:
        """Return the indices of the files that a row shows."""
        start, stop = self.starts[row : row + 2].tolist()
        return self.shown[start:stop].tolist()


def joined_images(parts: Sequence[tuple[RowImages | None, int]]) -> RowImages | None:
    """Return the images of several sources' rows as one, source after source; None where no row shows any.

    Args:
        parts: the images of each source, and the number of its rows.
    """
    if all(images is None for images, _ in parts):
        return None
    files: list[ImageFile] = []
    rows: list[list[int]] = []
    for images, count in parts:
        offset = len(files)
        if images is None:
            rows += [[] for _ in range(count)]
            continue
        rows += [[offset + one for one in images.row(row)] for row in range(count)]
        files += images.files
    return RowImages.of(files, rows)
