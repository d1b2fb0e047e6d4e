"""The record of a run in its output directory: which layers are finished, and what was decided at the start.

A finished layer file is the record of that layer: it appears whole or not at all, and its header carries
the run's fingerprint and the layer's report. `run.json` claims the directory and keeps what a later
attempt must not decide anew.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.folder import PARTIAL, Folder, output_folder
from shardprune.storage.output_names import EVENTS, RESULT, STATE
from shardprune.storage.records import LayerRecord
from shardprune.storage.safetensors_file import Shapes, read_header, read_tensor, write_each

KEY = "shardprune"  # of the metadata in a layer file's header


class Journal:
    """The output directory of a run with a given fingerprint over a model of `layers` decoder layers.

    `stored_name` says what the files call a tensor.
    """

    def __init__(self, out: str, fingerprint: str, layers: int, stored_name: Callable[[str], str] = str) -> None:
        self.folder = output_folder(out)
        self.fingerprint = fingerprint
        self.layers = layers
        self._stored_name = stored_name

    # -- names --------------------------------------------------------------------------------------------

    @property
    def frame_file(self) -> str:
        """The file of everything but the decoder layers."""
        return self._file(0)

    def layer_file(self, layer: int) -> str:
        return self._file(layer + 1)

    def _file(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.layers + 1:05d}.safetensors"

    # -- the claim ------------------------------------------------------------------------------------------

    def check(self, resume: bool) -> dict[str, Any] | None:
        """The state of this run's earlier attempt, or None where the directory is free.

        Raises:
            InputError: the directory holds something else, may not be resumed, or cannot be written.
        """
        state = self._found(resume)
        if state is None or "version" not in state:  # of a finished run nothing may be left to write
            self.folder.check_writable()
        return state

    def _found(self, resume: bool) -> dict[str, Any] | None:
        names = [name for name in self.folder.names() if not PARTIAL.fullmatch(name)]
        if not names:
            return None
        record = next((name for name in (RESULT, STATE) if name in names), None)
        if record is None:
            raise InputError("out", f"{self.folder.url} is not empty and holds no run; choose an empty directory")
        state = _record(self.folder, record)
        if state.get("fingerprint") != self.fingerprint:
            raise InputError("out", f"{self.folder.url} holds another run; choose an empty directory")
        if not resume:
            raise InputError("out", f"{self.folder.url} holds this run already; resume it or choose an empty directory")
        return _record(self.folder, STATE) if STATE in names else state

    def save(self, state: dict[str, Any]) -> None:
        """Record the state of the run, and with the first call claim the directory."""
        self.folder.write_json(STATE, {"fingerprint": self.fingerprint, **state})

    @contextmanager
    def claimed(self, earlier: dict[str, Any]) -> Iterator[None]:
        """A run at work in the directory, which is free again where bad input shows only now and nothing is done: as
        when the cluster gives no workers, or a worker finds its device too small.

        Args:
            earlier: the state of an earlier attempt, whose directory it stays.
        """
        try:
            yield
        except InputError:
            held = {name for name in self.folder.names() if not PARTIAL.fullmatch(name)}
            if not earlier and held <= {STATE, EVENTS} and not _record(self.folder, STATE).get("restarts"):
                for name in sorted(held):
                    self.folder.remove(name)
            raise

    # -- layers ---------------------------------------------------------------------------------------------

    def finished(self) -> dict[int, LayerRecord]:
        """Return the records of all finished layers by their index.

        Raises:
            InputError: a layer file belongs to another run, or was written by another version.
        """
        present = set(self.folder.names())
        records = {}
        for layer in range(self.layers):
            if self.layer_file(layer) in present:
                try:
                    _, metadata = read_header(self.folder, self.layer_file(layer))
                except InputError:  # damaged, as by a file system that crashed: it is made again
                    continue
                record = json.loads(metadata.get(KEY, "{}"))
                if record.pop("fingerprint", None) != self.fingerprint:
                    raise InputError("out", f"{self.layer_file(layer)} belongs to another run")
                try:
                    records[layer] = LayerRecord.read(record)
                except (KeyError, TypeError, ValueError) as error:
                    reason = "was written by another version; choose an empty directory"
                    raise InputError("out", f"{self.layer_file(layer)} {reason}") from error
        return records

    def write_layer(self, shapes: Shapes, tensor: Callable[[str], Tensor], record: LayerRecord) -> None:
        """Write the finished layer of a record: from then on no attempt works on it again."""
        whole = {"fingerprint": self.fingerprint, **record.plain()}
        names = {self._stored_name(name): name for name in shapes}
        stored = {key: shapes[name] for key, name in names.items()}
        metadata = {KEY: json.dumps(whole)}
        write_each(self.folder, self.layer_file(record.layer), stored, lambda key: tensor(names[key]), metadata)

    def read_layer(self, layer: int, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of a finished layer by name, one after the other."""
        entries, _ = read_header(self.folder, self.layer_file(layer))
        for name in names:
            yield name, read_tensor(self.folder, entries[self._stored_name(name)])

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result; the state is no longer needed."""
        self.folder.write_json(RESULT, result)
        self.folder.remove(STATE)


def recorded_recipe(out: str) -> dict[str, Any]:
    """The recipe, with all its choices made, of the run that an output directory holds; empty where it holds none."""
    folder = output_folder(out)
    for name in (STATE, RESULT):
        recipe = _record(folder, name).get("recipe") if folder.is_file(name) else None
        if isinstance(recipe, dict):
            return recipe
    return {}


def _record(folder: Folder, name: str) -> dict[str, Any]:
    """The fields of a state or result file; none where it is not ours to read."""
    try:
        record = folder.read_json(name)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
