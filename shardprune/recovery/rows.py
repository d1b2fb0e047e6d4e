"""Rows of tokens for training, and the packing of examples into rows.

A packed row holds several examples, one after another, and positions restart at 0 with each. No token attends to
another example's: a model attends by examples (packed_attention.py) or, where it cannot, transformers recognises such
rows by their positions and makes a mask, as long as neither a mask nor a cache is given. OPT's code ignores the
positions and gets the mask.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.model.families import FAMILIES
from shardprune.recovery.row_images import ImageFile, RowImages
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import read_header, read_tensor, write_tensors

IGNORED = -100  # label of tokens that are no targets
TENSORS = ("tokens", "learned", "positions", "starts")  # of rows in a file
OF_IMAGES, FILES = ("shown", "image_starts"), "images"  # and of their images; the files' names, a text beside them


class Example(NamedTuple):
    """The tokens of one example, int32 [tokens], and whether each is a target of the loss, bool [tokens].

    The first token is never a target, whatever `learned` says: nothing precedes it. `images` are those that it shows,
    by their places in a list of files.
    """

    tokens: Tensor
    learned: Tensor
    images: tuple[int, ...] = ()


class Row(NamedTuple):
    """Views of one row: int32, bool and int32 [tokens]."""

    tokens: Tensor
    learned: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of different lengths, concatenated.

    Attributes:
        tokens: int32 [total].
        learned: bool [total], whether the loss counts the prediction of this token.
        positions: int32 [total], restarting at 0 with every example of a row.
        starts: int64 [rows + 1], the start of each row, and the total at the end.
        images: that the rows show; None where no row shows any.
    """

    tokens: Tensor
    learned: Tensor
    positions: Tensor
    starts: Tensor
    images: RowImages | None = None

    @classmethod
    def of(cls, groups: Sequence[Sequence[Example]], files: Sequence[ImageFile] = ()) -> "Rows":
        """Concatenate the examples of each group into a row; `files` are the images of all examples."""
        examples = [example for group in groups for example in group]
        sizes = [sum(len(example.tokens) for example in group) for group in groups]
        positions = [torch.arange(len(example.tokens), dtype=torch.int32) for example in examples]
        rows = cls(
            torch.cat([torch.empty(0, dtype=torch.int32), *(example.tokens for example in examples)]),
            torch.cat([torch.empty(0, dtype=torch.bool), *(example.learned for example in examples)]),
            torch.cat([torch.empty(0, dtype=torch.int32), *positions]),
            torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0),
            RowImages.of(files, [[one for example in group for one in example.images] for group in groups])
            if files
            else None,
        )
        rows.learned[rows.positions == 0] = False
        return rows

    @classmethod
    def load(cls, folder: Folder, name: str) -> "Rows":
        """Load rows that `save` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        entries, metadata = read_header(folder, name)
        tensors = {key: read_tensor(folder, entry) for key, entry in entries.items()}
        shown, starts = (tensors.pop(key, None) for key in OF_IMAGES)
        images = None if shown is None or starts is None else RowImages.parsed(metadata[FILES], shown, starts)
        return cls(tensors["tokens"], tensors["learned"], tensors["positions"], tensors["starts"], images)

    def save(self, folder: Folder, name: str) -> None:
        """Write the rows as a safetensors file, complete or not at all."""
        tensors = self._tensors()
        if self.images is None:
            write_tensors(folder, name, tensors, {})
        else:
            tensors |= dict(zip(OF_IMAGES, (self.images.shown, self.images.starts), strict=True))
            write_tensors(folder, name, tensors, {FILES: self.images.as_text()})

    def digest(self) -> str:
        """Return the SHA-256 of all tensors, and of what tells the images apart."""
        content = hashlib.sha256()
        for name, tensor in self._tensors().items():
            content.update(f"{name} {len(tensor)} ".encode())
            content.update(tensor.numpy().tobytes())
        if self.images is not None:
            content.update(self.images.digest().encode())
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def longest(self) -> int:
        """The tokens of the longest row; 0 without rows."""
        return int(self.starts.diff().max()) if len(self) else 0

    @property
    def packed(self) -> bool:
        """Whether some row holds more than one example."""
        return int((self.positions == 0).sum()) > len(self)

    def row(self, index: int) -> Row:
        """Return row `index`, counted from 0."""
        part = slice(*self.starts[index : index + 2].tolist())
        return Row(self.tokens[part], self.learned[part], self.positions[part])

    def targets(self, rows: Sequence[int]) -> int:
        """Count the targets of the loss in these rows."""
        return sum(int(self.row(index).learned.sum()) for index in rows)

    def targets_of_each(self) -> Tensor:
        """Count the targets of the loss in every row, int64 [rows]."""
        return self.counts_of_each(self.learned)

    def counts_of_each(self, chosen: Tensor) -> Tensor:
        """Count the tokens of every row that are chosen, bool [total], int64 [rows]."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.cumsum(0)])
        return before[self.starts].diff()

    def size(self, rows: Sequence[int]) -> int:
        """Count the tokens of these rows."""
        return sum(len(self.row(index).tokens) for index in rows)

    def select(self, rows: Sequence[int]) -> "Rows":
        """Return some of the rows, in the order given."""
        chosen = [self.row(index) for index in rows]
        sizes = [len(row.tokens) for row in chosen]
        return Rows(
            torch.cat([self.tokens[:0], *(row.tokens for row in chosen)]),
            torch.cat([self.learned[:0], *(row.learned for row in chosen)]),
            torch.cat([self.positions[:0], *(row.positions for row in chosen)]),
            torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0),
            self.images and self.images.select(rows),
        )

    def split(self, held_out: float, seed: int) -> tuple["Rows", "Rows"]:
        """Split into rows to learn from and a held-out share, drawn with the seed; both keep the order of the rows.

        Each part has at least one row, unless the share is 0 and none is held out.

        Raises:
            InputError: there are too few rows for two parts.
        """
        if not held_out:
            return self, self.select([])
        if len(self) < 2:
            raise InputError(
                "held_out", f"{held_out:g} of {len(self)} rows leaves none for one part; use 0 or more data"
            )
        count = min(max(round(held_out * len(self)), 1), len(self) - 1)
        drawn = permutation(len(self), f"split {seed}").tolist()
        return self.select(sorted(drawn[count:])), self.select(sorted(drawn[:count]))

    def order(self, epoch: int, seed: int) -> Tensor:
        """Return the order of the rows in one epoch, int64 [rows], a function of epoch and seed alone."""
        return permutation(len(self), f"epoch {epoch} {seed}")

    def collate(self, rows: Sequence[int], mask: bool = False) -> dict[str, Tensor]:
        """Build the arguments of a model's forward pass on a batch of rows; call it with `use_cache=False`.

        Padding is on the right, where causal attention does not see it, so that no mask is needed. Its positions
        continue the last example's: positions that restart would make transformers take the row for a packed one.

        Args:
            mask: from `needs_mask`; adds `attention_mask` if a row is packed, bool [batch, 1, longest, longest], true
                where a query (third dimension) attends to a key (fourth).

        Returns:
            `input_ids`, `labels` (-100 for tokens that are no targets) and `position_ids`, each int64 [batch, longest].
        """
        chosen = [self.row(index) for index in rows]
        longest = max(len(row.tokens) for row in chosen)
        input_ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORED)
        position_ids = torch.zeros_like(input_ids)
        for index, row in enumerate(chosen):
            size = len(row.tokens)
            input_ids[index, :size] = row.tokens
            labels[index, :size] = torch.where(row.learned, row.tokens.long(), IGNORED)
            position_ids[index, :size] = row.positions
            position_ids[index, size:] = torch.arange(1, longest - size + 1) + row.positions[-1]
        batch = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if mask and bool((position_ids[:, 1:] == 0).any()):
            batch["attention_mask"] = _block_mask(position_ids)
        return batch

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}


def permutation(count: int, purpose: str) -> Tensor:
    """Return a random order of so many rows, int64 [count], a function of its purpose alone."""
    # A hash, because seed + epoch would give epoch 1 of seed 0 the order of epoch 0 of seed 1.
    state = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7], "big")
    return torch.randperm(count, generator=torch.Generator().manual_seed(state))


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Assign examples of the given sizes, each at most `length`, to rows of at most `length`; none is cut.

    Best-fit decreasing: the longest example first, each into the row with the least sufficient room. At most one row is
    less than half full. Return the indices of each row's examples.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row) of rows that are not full; sorted
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        place = bisect_left(room, (sizes[index], 0))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(index)
        else:
            left, row = length, len(rows)
            rows.append([index])
        if left > sizes[index]:
            insort(room, (left - sizes[index], row))
    return rows


def check_packing(model_type: str) -> None:
    """Check that models of a `model_type` can keep the examples of a packed row apart.

    Raises:
        InputError: they cannot.
    """
    packing = [name for name, family in FAMILIES.items() if family.packing is not None]
    if model_type not in packing:
        raise InputError("packing", f"not for model_type {model_type!r}, but for {', '.join(packing)}; turn it off")


def needs_mask(model_type: str) -> bool:
    """Return whether packed rows of a model need an explicit attention mask."""
    return model_type in FAMILIES and FAMILIES[model_type].packing == "mask"


def _block_mask(position_ids: Tensor) -> Tensor:
    """Return the block-diagonal causal mask of rows of examples [batch, longest], bool [batch, 1, longest, longest]."""
    example = (position_ids == 0).cumsum(1)
    return (example[:, :, None] == example[:, None, :]).tril()[:, None]
