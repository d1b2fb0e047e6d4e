"""Layers that a checkpoint has beside those of the model, as for the prediction of further tokens (MTP).

transformers does not run them, other engines do, with the same number of experts. They keep the experts that the
model's last layer with experts keeps, for they have no pass of their own. A tensor is known by the end of its name,
which is that of a tensor within that layer. Where experts are merged, so are theirs, by the same averages.
"""

import re
from collections.abc import Callable

from torch import Tensor

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.expert_averages import Sources, average, rows_of
from shardprune.model.expert_removal import FewerExperts
from shardprune.model.experts import STACKS
from shardprune.model.fp8 import names_of_scales
from shardprune.storage.journal import Cut, Journal
from shardprune.storage.records import KeptExperts
from shardprune.storage.safetensors_file import StoredTensor


class FurtherLayers:
    """The tensors of a checkpoint that belong to no layer of its model: the frame, and further layers.

    Raises:
        InputError: some are of experts, and what becomes of them is not known.
    """

    def __init__(self, fewer: FewerExperts) -> None:
        self._fewer, self._checkpoint = fewer, fewer.stored
        skeleton = fewer.skeleton
        inside = {name for index in range(skeleton.layers) for name in skeleton.layer_tensors(index)}
        inside |= {scales for name in inside for scales in names_of_scales(name)}
        self._outside = [name for name in self._checkpoint.entries if name not in inside]
        self._last = max(fewer.mixture.layers)
        path = fewer.mixture.layers[self._last]
        parts = [name for part in fewer.parts(self._last) for name in (part, *names_of_scales(part))]
        self._own = re.compile(rf"(?:^|.*\.){re.escape(path)}\.(\d+)\.(?:{'|'.join(map(re.escape, parts))})")
        stacks = {f"{path}.{leaf}": 0 for leaf in STACKS}
        self._ends = stacks | fewer.sliced(self._last)
        frame = skeleton.tensors()
        for name in self._outside:
            if name not in frame:
                self._check(name)

    def _check(self, name: str) -> None:
        """Check that it is known what becomes of a tensor."""
        entry, experts = self._checkpoint.entries[name], self._fewer.mixture.experts
        dimension = self._dimension(name)
        own = self._own.fullmatch(name)
        fits = own is None or int(own[1]) < experts
        fits = fits and (dimension is None or entry.shape[dimension : dimension + 1] == (experts,))
        if not fits or (".experts." in name and own is None and dimension is None):
            reason = "of a layer that transformers does not run, and whose experts are not those of the others"
            raise InputError("model", f"{self._checkpoint.folder.url} holds {name}, {reason}")

    def _dimension(self, name: str) -> int | None:
        """Return the dimension of experts of a tensor that has one; None for others."""
        return next((dimension for end, dimension in self._ends.items() if f".{name}".endswith(f".{end}")), None)

    def write(self, journal: Journal, experts: KeptExperts) -> None:
        """Write the frame, and the further layers with some experts: copies, byte by byte, and averages.

        Args:
            experts: those that the model's last layer with experts keeps.
        """
        checkpoint, frame = self._checkpoint, self._fewer.skeleton.tensors()
        copied: dict[str, StoredTensor] = {}
        cut: dict[str, Cut] = {}
        for name in self._outside:
            stored = checkpoint.stored_name(name)
            if name in frame:
                copied[stored] = checkpoint.stored(name)
            elif own := self._own.fullmatch(name):
                if (expert := int(own[1])) in experts.kept:
                    number = experts.kept.index(expert)
                    place, sources = f"{stored[: own.start(1)]}{number}{stored[own.end(1) :]}", experts.sources(number)
                    if len(sources) == 1:
                        copied[place] = checkpoint.stored(name)
                    else:
                        entry = checkpoint.entries[name]
                        cut[place] = Cut(entry.dtype, entry.shape, _averaged(checkpoint, own, sources))
            elif (dimension := self._dimension(name)) is not None:
                entry = checkpoint.entries[name]
                shape = (*entry.shape[:dimension], len(experts.kept), *entry.shape[dimension + 1 :])
                inside = f".{self._fewer.mixture.layers[self._last]}." in f".{name}"
                cut[stored] = Cut(entry.dtype, shape, _rows(checkpoint, name, dimension, experts, inside))
            else:
                copied[stored] = checkpoint.stored(name)
        journal.copy_frame(copied, cut)
        checkpoint.check_unchanged(self._outside)


def _averaged(checkpoint: Checkpoint, own: re.Match[str], sources: Sources) -> Callable[[], Tensor]:
    """Return a function that reads the average of tensors of several experts; the number of one is in its match."""
    before, behind = own.string[: own.start(1)], own.string[own.end(1) :]
    return lambda: average(sources, lambda expert: checkpoint.read(f"{before}{expert}{behind}"))


def _rows(
    checkpoint: Checkpoint, name: str, dimension: int, experts: KeptExperts, inside: bool
) -> Callable[[], Tensor]:
    """Return a function that reads the rows that some experts leave of a tensor, which is `inside` them or a
    router's."""
    return lambda: rows_of(checkpoint.read(name), dimension, experts, inside)
