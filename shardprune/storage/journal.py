"""The record of a run in its output directory: finished layers, and the decisions made at its start.

A finished layer file is the record of that layer: it appears complete or not at all, and its header carries the run's
fingerprint and the layer's report. `run.json` claims the directory and keeps the decisions that a resumed run must not
make again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.digests import parts_of, pieces_digest, stored_digest, tensor_digest
from shardprune.storage.folder import PARTIAL, Folder, output_folder
from shardprune.storage.joined_tensors import Joined
from shardprune.storage.output_names import EVENTS, OWNER, RESULT, SELF_RECORD, SELF_TOKENS, STATE
from shardprune.storage.owner import check_unowned
from shardprune.storage.records import LayerRecord
from shardprune.storage.relative_paths import absolute_paths, relative_paths
from shardprune.storage.safetensors_file import (
    Entry,
    Shapes,
    StoredTensor,
    read_header,
    write_pieces,
    write_tensors,
)
from shardprune.storage.scaled_tensors import stored_tensor
from shardprune.storage.seals import BrokenSeal, NoSeal, read_sealed, sealed
from shardprune.storage.stacks import Place, Slice, stack_matrices
from shardprune.storage.tensor_facts import TensorFacts

READERS = 4  # layers that are read at the same time, to be compared


@dataclass(frozen=True)
class Earlier:
    """An earlier attempt at a run: its `state`, or its `result` where it was finished; nothing of a free directory."""

    state: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return self.state is not None or self.result is not None


@dataclass(frozen=True)
class Cut:
    """A part of a stored tensor, of a dtype and a shape, which is read when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Journal:
    """The output directory of one run.

    Args:
        out: path or URL of the directory.
        fingerprint: of the run; a directory with another one is refused.
        layers: decoder layers of the model that is written.
        place: maps a tensor's name to its place in the files.
        entry: returns where the tensor at a place is, by the entries of a file's.
    """

    def __init__(
        self,
        out: str,
        fingerprint: str,
        layers: int,
        place: Callable[[str], Place] = Place,
        entry: Callable[[Place, Mapping[str, Entry]], Entry] = Place.entry,
    ) -> None:
        self.folder = output_folder(out)
        self.fingerprint = fingerprint
        self.layers = layers
        self._place, self._entry = place, entry

    # -- names --------------------------------------------------------------------------------------------

    @property
    def frame_file(self) -> str:
        """The file of the frame: everything but the decoder layers."""
        return self._file(0)

    def layer_file(self, layer: int) -> str:
        return self._file(layer + 1)

    def _file(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.layers + 1:05d}.safetensors"

    # -- the claim ------------------------------------------------------------------------------------------

    def check(self, resume: bool) -> Earlier:
        """Return what the directory holds of this run.

        Raises:
            InputError: the directory holds something else, is in use, may not be resumed, or cannot be written.
        """
        earlier = self._found(resume)
        if earlier.result is None:  # a finished run may lie in a directory that is read-only by now
            check_unowned(self.folder)
            self.folder.check_writable()
        return earlier

    def _found(self, resume: bool) -> Earlier:
        names = lasting_names(self.folder)
        if not names:
            return Earlier()
        record = next((name for name in (RESULT, STATE) if name in names), None)
        if record is None:
            raise InputError("out", f"{self.folder.url} is not empty and holds no run; choose an empty directory")
        found = _record(self.folder, record)
        if found.get("fingerprint") != self.fingerprint:
            raise InputError("out", f"{self.folder.url} holds another run; choose an empty directory")
        if not resume:
            raise InputError("out", f"{self.folder.url} holds this run already; resume it or choose an empty directory")
        # A state beside a result is of a run that was cut off between writing one and removing the other.
        return Earlier(state=_record(self.folder, STATE)) if STATE in names else Earlier(result=found)

    def save(self, state: dict[str, Any]) -> None:
        """Write the state of the run; the first call claims the directory."""
        content = {"fingerprint": self.fingerprint, **state}
        self.folder.write_json(STATE, relative_paths(content, self.folder.url))

    @contextmanager
    def claimed(self, resumed: bool) -> Iterator[None]:
        """Release the directory again if bad input is found before anything is done, for example because the cluster
        has too few workers or a worker's device is too small.

        Args:
            resumed: the directory holds an earlier attempt, and is kept.
        """
        try:
            yield
        except InputError:
            held = lasting_names(self.folder)
            if (
                not resumed
                and held <= {STATE, EVENTS, SELF_TOKENS, SELF_RECORD}
                and not _record(self.folder, STATE).get("restarts")
            ):
                for name in sorted(held):
                    self.folder.remove(name)
            raise

    # -- layers ---------------------------------------------------------------------------------------------

    def finished(self) -> dict[int, LayerRecord]:
        """Return the records of all finished layers by their index; those whose files are damaged are not finished.

        Raises:
            InputError: a layer file belongs to another run, or was written by another version.
        """
        return self.found()[0]

    def found(self) -> tuple[dict[int, LayerRecord], dict[int, str]]:
        """Return the records of all finished layers by their index, and what is wrong with the files of others, by the
        headers of all.

        Raises:
            InputError: as `finished` does.
        """
        present = set(self.folder.names())
        records, damaged = {}, {}
        for layer in range(self.layers):
            if self.layer_file(layer) in present:
                try:
                    records[layer] = self._record(layer)
                except BrokenSeal as error:
                    damaged[layer] = str(error)
        return records, damaged

    def remove_damaged(self, say: Callable[[str], None]) -> None:
        """Compare every tensor of the finished layers with what was written, count its zeros, and remove the files in
        which something differs: these layers are made again.

        Args:
            say: is told of each.

        Raises:
            InputError: as `finished` does.
        """
        records, damaged = self.found()
        if records:
            say(f"comparing {len(records)} finished layers with their digests")
        with ThreadPoolExecutor(READERS) as readers:
            faults = readers.map(self._fault, records.values())
            damaged |= {layer: fault for layer, fault in zip(records, faults, strict=True) if fault}
        for layer, fault in sorted(damaged.items()):
            say(f"{self.layer_file(layer)} {fault}: layer {layer} is made again")
            self.folder.remove(self.layer_file(layer))

    def fault(self, layer: int) -> str | None:
        """Return what is wrong with the file of a layer that is finished, as `remove_damaged` finds it.

        Raises:
            InputError: as `finished` does.
        """
        file = self.layer_file(layer)
        if not self.folder.is_file(file):
            return f"{file} is missing"
        try:
            fault = self._fault(self._record(layer))
        except BrokenSeal as error:
            fault = str(error)
        return fault and f"{file} {fault}"

    def _record(self, layer: int) -> LayerRecord:
        file = self.layer_file(layer)
        try:
            _, fields, _ = read_sealed(self.folder, file)
            if fields.pop("fingerprint", None) != self.fingerprint:
                raise InputError("out", f"{file} belongs to another run")
            return LayerRecord.read(fields)
        except NoSeal as error:
            raise InputError("out", f"{file} {error}; choose an empty directory") from error
        except BrokenSeal:
            raise
        except InputError as error:
            if error.problem == f"{file} belongs to another run":
                raise
            raise BrokenSeal("cannot be read") from error  # for example by a crash of the file system
        except ValueError as error:
            raise InputError("out", f"{file} was written by another version; choose an empty directory") from error

    def _fault(self, record: LayerRecord) -> str | None:
        """Return what is wrong with the data of a finished layer."""
        entries, _, digests = read_sealed(self.folder, self.layer_file(record.layer))
        zeros = {report.name: report.zeros for report in record.projections}
        for name, entry in entries.items():
            facts = TensorFacts.of(StoredTensor(self.folder, entry))
            if facts.digest != digests[name]:
                return f"holds other data for {name} than was written"
            counted = next((zeros[own] for own in zeros if name.endswith(f".{own}.weight")), None)
            if counted not in (None, facts.zeros):
                return f"holds {facts.zeros} zeros in {name}, and its record says {counted}"
        return None

    def write_layer(self, shapes: Shapes, tensor: Callable[[str], Tensor], record: LayerRecord) -> None:
        """Write the finished layer of a record; resumed runs skip it from then on.

        Args:
            tensor: returns the tensor of a name; called twice, for its digest and for its data.
        """
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        whole: dict[str, str] = {}  # names of tensors by their names in the file
        stacks: dict[str, dict[str, Slice]] = {}
        joined: dict[str, tuple[str, Joined]] = {}
        for name, (dtype, shape) in shapes.items():
            place = self._place(name)
            if place.joined is not None:
                for part, own in place.joined.shapes(shape).items():
                    joined[part], stored[part] = (name, place.joined), (dtype, own)
            elif place.slice is None:
                whole[place.name], stored[place.name] = name, (dtype, shape)
            else:
                stacks.setdefault(place.name, {})[name] = place.slice
                stored[place.name] = dtype, place.slice.shape

        def pieces(key: str) -> Iterable[Tensor]:
            if key in joined:
                name, own = joined[key]
                return [own.part(key, tensor(name))]
            return [tensor(whole[key])] if key in whole else stack_matrices(stacks[key], stored[key][0], tensor)

        digests = {key: pieces_digest(pieces(key)) for key in stored}
        metadata = sealed({"fingerprint": self.fingerprint, **record.plain()}, digests, stored)
        write_pieces(self.folder, self.layer_file(record.layer), stored, pieces, metadata)

    def read_layer(self, layer: int, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of a finished layer by name, one at a time."""
        for name, stored in self.stored_layer(layer, names).items():
            yield name, stored.read()

    def stored_layer(self, layer: int, names: Iterable[str]) -> dict[str, StoredTensor]:
        """Return tensors of a finished layer in its file, by name."""
        entries, _ = read_header(self.folder, self.layer_file(layer))
        return {name: stored_tensor(self.folder, self._entry(self._place(name), entries)) for name in names}

    # -- the rest -------------------------------------------------------------------------------------------

    def layer_tensors(self, layer: int) -> set[str]:
        """Return the names in its file of the tensors of a finished layer."""
        return set(read_header(self.folder, self.layer_file(layer))[0])

    def copy_frame(self, tensors: Mapping[str, StoredTensor], cut: Mapping[str, Cut] | None = None) -> None:
        """Write the frame of stored tensors, by their names in the files, byte by byte.

        Args:
            cut: tensors of which there are parts alone, by their names in the files.
        """
        parts = cut or {}
        entries = {name: stored.entry for name, stored in tensors.items()}
        assert all(entry.strides is None for entry in entries.values())
        shapes = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        shapes |= {name: (own.dtype, own.shape) for name, own in parts.items()}

        def pieces(name: str) -> Iterable[Tensor]:
            return [parts[name].read()] if name in parts else parts_of(tensors[name])

        digests = {name: stored_digest(stored) for name, stored in tensors.items()}
        digests |= {name: pieces_digest(pieces(name)) for name in parts}
        write_pieces(self.folder, self.frame_file, shapes, pieces, self._frame_metadata(digests, shapes))

    def write_frame(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the frame of tensors in memory, by their names in the files."""
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
        write_tensors(self.folder, self.frame_file, tensors, self._frame_metadata(digests, shapes))

    def _frame_metadata(self, digests: Mapping[str, str], shapes: Shapes) -> dict[str, str]:
        return sealed({"fingerprint": self.fingerprint, "frame": True}, digests, shapes)

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and remove the state, which is no longer needed."""
        result = relative_paths(result, self.folder.url)
        self.folder.write_json(RESULT, result)  # first: a directory with neither file is not recognised as a run
        self.folder.remove(STATE)


def lasting_names(folder: Folder) -> set[str]:
    """Return the names of all that lies in an output directory and does not pass with a process."""
    return {name for name in folder.names() if name != OWNER and not PARTIAL.fullmatch(name)}


def check_output(out: str, resume: bool) -> None:
    """Check what can be said of an output directory before anything that shapes its run has been read.

    Raises:
        InputError: it holds something else than a run, or one that may not be resumed, or cannot be written.
    """
    folder = output_folder(out)
    names = lasting_names(folder)
    if names and not names & {STATE, RESULT}:
        raise InputError("out", f"{folder.url} is not empty and holds no run; choose an empty directory")
    if names and not resume:
        raise InputError("out", f"{folder.url} holds a run already; resume it or choose an empty directory")
    if RESULT not in names:
        folder.check_writable()


def recorded_recipe(out: str) -> dict[str, Any]:
    """Return the recipe, with all defaults resolved, of the run in an output directory; empty if it holds none."""
    folder = output_folder(out)
    for name in (STATE, RESULT):
        recipe = _record(folder, name).get("recipe") if folder.is_file(name) else None
        if isinstance(recipe, dict):
            return recipe
    return {}


def _record(folder: Folder, name: str) -> dict[str, Any]:
    """Return the fields of a state or result file; empty if it is not one of shardprune's."""
    try:
        record = absolute_paths(folder.read_json(name), folder.url)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
