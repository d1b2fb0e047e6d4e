"""A teacher's largest predictions in files of the training's state: made once, before the student is loaded.

The rows that the training will use are cut into parts of a fixed number of predictions, and a file holds those of a
part, in the order of rows. What it holds depends on rows, teacher and recipe alone, so that a pass that was cut off
goes on with the parts that are missing, in any number of processes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.recovery.distillation import STORED, TOKENS
from shardprune.recovery.rows import Rows
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import Entry, read_elements, read_header, write_tensors

FILES = "teacher-"  # beginning of the files' names
PART = 2**16  # predictions of a file, or more by less than a row


class TeacherStore:
    """The stored predictions of a teacher for some rows.

    Args:
        folder: the training's state.
        used: indices of the rows that the training uses, ascending.
        top: predictions that are stored of each place.
    """

    def __init__(self, folder: Folder, rows: Rows, used: Sequence[int], top: int) -> None:
        self._folder, self.rows, self._used, self.top = folder, rows, used, top
        counts = rows.targets_of_each()
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts[torch.tensor(used, dtype=torch.int64)].cumsum(0)])
        self._starts: list[int] = ends.tolist()  # first prediction of each used row, and their number at the end
        firsts = [0]  # of each part, an index into the used rows
        for place, start in enumerate(self._starts[:-1]):
            if start - self._starts[firsts[-1]] >= PART:
                firsts.append(place)
        self._firsts = [*firsts, len(used)]
        self._entries: dict[int, dict[str, Entry]] = {}  # by part, of those that were read

    @property
    def parts(self) -> int:
        """The number of files."""
        return len(self._firsts) - 1

    @property
    def predictions(self) -> int:
        """The number of places whose predictions are stored."""
        return self._starts[-1]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return self.predictions * bytes_per_prediction(self.top)

    def bytes_missing(self) -> int:
        """Return the bytes of the tensors that are not stored yet."""
        ends = (self._firsts[part : part + 2] for part in self.missing())
        return sum(self._starts[stop] - self._starts[first] for first, stop in ends) * bytes_per_prediction(self.top)

    def missing(self) -> list[int]:
        """Return the parts without a file."""
        names = set(self._folder.names())
        return [part for part in range(self.parts) if _file(part) not in names]

    def batches(self, part: int, micro: int) -> Iterator[Sequence[int]]:
        """Yield the rows of a part, at most `micro` at a time."""
        first, stop = self._firsts[part : part + 2]
        for start in range(first, stop, micro):
            yield self._used[start : min(start + micro, stop)]

    def write(self, part: int, tokens: Tensor, chances: Tensor) -> None:
        """Write the predictions of a part, complete or not at all.

        Args:
            tokens, chances: of its predictions, as `largest` returns them.
        """
        write_tensors(self._folder, _file(part), {"tokens": tokens, "chances": chances}, {})

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the tokens [predictions, K] and log-probabilities [predictions, K + 1] of rows, in their order.

        Raises:
            InputError: a file is missing or not that of this training.
        """
        tokens, chances = zip(*map(self._row, rows), strict=True)
        return torch.cat(tokens), torch.cat(chances)

    def _row(self, row: int) -> tuple[Tensor, Tensor]:
        place = bisect_right(self._used, row) - 1
        assert self._used[place] == row, f"row {row} is none that the training uses"
        part = bisect_right(self._firsts, place) - 1
        before = self._starts[self._firsts[part]]
        start, stop = (self._starts[end] - before for end in (place, place + 1))
        if part not in self._entries:
            self._entries[part] = self._open(part)
        entries = self._entries[part]

        def read(name: str, width: int) -> Tensor:
            return read_elements(self._folder, entries[name], start * width, stop * width).view(-1, width)

        return read("tokens", self.top), read("chances", self.top + 1)

    def _open(self, part: int) -> dict[str, Entry]:
        """Read the header of a file, and check that it holds what it should."""
        entries, _ = read_header(self._folder, _file(part))
        first, stop = (self._starts[end] for end in self._firsts[part : part + 2])
        wanted = {
            "tokens": (TOKENS, (stop - first, self.top)),
            "chances": (STORED, (stop - first, self.top + 1)),
        }
        if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != wanted:
            where = f"{self._folder.url}/{_file(part)}"
            raise InputError("state", f"{where} does not hold the teacher's predictions of this training; remove it")
        return entries


def _file(part: int) -> str:
    return f"{FILES}{part:06d}.safetensors"


def check_top(top: int, vocabulary: int) -> None:
    """Check that some of a teacher's predictions are left for the mass of all others.

    Raises:
        InputError: as many are to be stored as there are.
    """
    if top >= vocabulary:
        raise InputError("teacher_top", f"{top} is not less than the teacher's {vocabulary} tokens")


def bytes_per_prediction(top: int) -> int:
    """Return the bytes that are stored of one prediction."""
    return top * TOKENS.itemsize + (top + 1) * STORED.itemsize
