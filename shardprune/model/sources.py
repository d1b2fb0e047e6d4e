"""The files of a checkpoint, watched while a run reads them: what it reads must come from one and the same model.

When a checkpoint is opened, its files are stamped; each tensor that is read gets a digest. The stamps are compared with
those of now whenever a layer has been read and when the run ends, the digests whenever a tensor is read again: by
another worker, after a restart, or by a later attempt, which has both from `run.json`.
"""

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from shardprune.errors import InputChanged, InputError, StorageError
from shardprune.storage.digests import StreamedDigest, tensor_digest
from shardprune.storage.folder import Folder
from shardprune.storage.safetensors_file import StoredTensor, bytes_of
from shardprune.storage.stamps import Stamp, stamps_of


@dataclass(frozen=True)
class SourceState:
    """A checkpoint as a run knows it: stamps of its files on a `host`, its identity by a sample of every tensor, and
    the digests of the tensors that have been read, by their names in the files; `fp8_as` is torch's name of the dtype
    in which FP8 weights are read, where there are any."""

    host: str
    stamps: dict[str, Stamp]
    sample: str
    digests: dict[str, str] = field(default_factory=dict)
    fp8_as: str | None = None


class Source:
    """The watched files of one checkpoint.

    Args:
        files: their names, stamped now: before anything in them is read.
    """

    def __init__(self, folder: Folder, files: Iterable[str]) -> None:
        self._folder = folder
        self.stamps = stamps_of(folder, files)
        self.digests: dict[str, str] = {}  # of what was read here or, as far as that is known, elsewhere
        self.new: dict[str, str] = {}  # of these, what nobody has asked for yet

    def keep(self, files: Iterable[str]) -> None:
        """Watch these files and no others."""
        self.stamps = {name: self.stamps[name] for name in files if name in self.stamps}

    def state(self, sample: str) -> SourceState:
        """Return what is known."""
        return SourceState(socket.gethostname(), dict(self.stamps), sample, dict(self.digests))

    # -- files ------------------------------------------------------------------------------------------------

    def check(self, files: Iterable[str] | None = None) -> None:
        """Compare files, or all of them, with their stamps.

        Raises:
            InputChanged: one is another now, or gone.
        """
        names = self.stamps.keys() if files is None else self.stamps.keys() & set(files)
        now = stamps_of(self._folder, names)
        for name in sorted(names):
            if now.get(name) != self.stamps[name]:
                raise self.changed(name)

    def admit(self, state: SourceState, sample: Callable[[], str]) -> None:
        """Take over what another process of the run knows, after a check that this one has opened the same model.

        On another machine, or under another inode, a file may be a copy: then samples of all tensors decide.

        Args:
            sample: returns the identity of the checkpoint opened here.

        Raises:
            InputChanged: it is another one.
        """
        elsewhere = socket.gethostname() != state.host
        differing = [name for name in state.stamps if self.stamps.get(name) != state.stamps[name]]
        for name in differing:
            here = self.stamps.get(name)
            if here is None or not (elsewhere or here.is_copy_of(state.stamps[name])):
                raise self.changed(name)
        if differing and sample() != state.sample:
            raise self.changed(differing[0])
        self.digests |= state.digests

    def resume(self, state: SourceState, needed: Iterable[str]) -> None:
        """Take over what an earlier attempt knew of this model.

        Args:
            needed: names of the tensors that this attempt may read for the first time.

        Raises:
            InputError: a file is another one, and of a tensor nobody knows whether it is what it was.
        """
        weights = {name: stamp for name, stamp in state.stamps.items() if name.endswith(".safetensors")}
        for name, stamp in weights.items():  # the fingerprint covers what the others say
            here = self.stamps.get(name)
            if here is None or not here.is_copy_of(stamp):
                unknown = sorted(set(needed) - state.digests.keys())
                if unknown:
                    reason = f"is not the file with which the run began (its size or its time differ), and {unknown[0]}"
                    helps = "was not read before; give the same file, its time included, or choose an empty directory"
                    raise InputError(self._folder.field, f"{self._folder.url}/{name} {reason} {helps}")
        self.digests |= state.digests

    def changed(self, name: str, reason: str = "is not the file that it was") -> InputChanged:
        """Return the error for a file, or a tensor, that has changed."""
        whole = f"{self._folder.url}/{name} {reason} when the run first read it"
        helps = "give the model back as it was, and the same command goes on"
        return InputChanged(self._folder.field, f"the model changed under the run: {whole}; {helps}")

    # -- tensors ----------------------------------------------------------------------------------------------

    def note(self, tensor: str, file: str, digest: str) -> None:
        """Compare the digest of a tensor that was read with the one of its first reading, or keep it as that.

        Raises:
            InputChanged: they differ.
        """
        known = self.digests.setdefault(tensor, digest)
        if known is digest:
            self.new[tensor] = digest
        elif known != digest:
            raise self.changed(file, f"holds another {tensor} than")

    def learn(self, digests: Mapping[str, str]) -> None:
        """Take over digests of another process of the run.

        Raises:
            InputChanged: a tensor was another one there.
        """
        for tensor, digest in digests.items():
            if self.digests.setdefault(tensor, digest) != digest:
                raise self.changed(tensor, "was another tensor")

    def hand_out(self) -> dict[str, str]:
        """Return the digests of what was read here for the first time, since the last call."""
        new, self.new = self.new, {}
        return new


@dataclass(frozen=True)
class SourceTensor(StoredTensor):
    """One tensor in a watched file."""

    name: str
    source: Source
    _digest: Any = field(default_factory=StreamedDigest, compare=False)

    def read(self) -> Tensor:
        with self._watched():
            tensor = super().read()
        self.source.note(self.name, self.entry.file, tensor_digest(tensor))
        return tensor

    def read_part(self, start: int, buffer: Tensor) -> None:
        with self._watched():
            super().read_part(start, buffer)

    def passed(self, start: int, part: Tensor) -> None:
        if start == 0:
            self._digest.reset()
        self._digest.update(bytes_of(part))
        if start + part.numel() == self.entry.size:
            self.source.note(self.name, self.entry.file, self._digest.hexdigest())

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Say of a file that became shorter, or is gone, that it has changed."""
        try:
            yield
        except StorageError:
            self.source.check([self.entry.file])
            raise
