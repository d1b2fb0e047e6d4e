"""The record of a run in its output directory: finished layers, and the decisions made at its start.

A finished layer file is the record of that layer: it appears complete or not at all, and its header carries the run's
fingerprint and the layer's report. `run.json` claims the directory and keeps the decisions that a resumed run must not
make again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardprune.errors import InputError
from shardprune.storage.folder import PARTIAL, Folder, output_folder
from shardprune.storage.json_file import dump_json, parse_json
from shardprune.storage.output_names import EVENTS, RESULT, STATE
from shardprune.storage.records import LayerRecord
from shardprune.storage.safetensors_file import Shapes, StoredTensor, read_header, write_each

KEY = "shardprune"  # of the record in the metadata of a layer file


@dataclass(frozen=True)
class Earlier:
    """An earlier attempt at a run: its `state`, or its `result` where it was finished; nothing of a free directory."""

    state: dict[str, Any] | None = None
    result: dict[str, Any] | None = None

    def __bool__(self) -> bool:
        return self.state is not None or self.result is not None


class Journal:
    """The output directory of one run.

    Args:
        out: path or URL of the directory.
        fingerprint: of the run; a directory with another one is refused.
        layers: decoder layers of the model that is written.
        stored_name: maps a tensor's name to its name in the files.
    """

    def __init__(self, out: str, fingerprint: str, layers: int, stored_name: Callable[[str], str] = str) -> None:
        self.folder = output_folder(out)
        self.fingerprint = fingerprint
        self.layers = layers
        self._stored_name = stored_name

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
            InputError: the directory holds something else, may not be resumed, or cannot be written.
        """
        earlier = self._found(resume)
        if earlier.result is None:  # a finished run may lie in a directory that is read-only by now
            self.folder.check_writable()
        return earlier

    def _found(self, resume: bool) -> Earlier:
        names = [name for name in self.folder.names() if not PARTIAL.fullmatch(name)]
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
        self.folder.write_json(STATE, {"fingerprint": self.fingerprint, **state})

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
            held = {name for name in self.folder.names() if not PARTIAL.fullmatch(name)}
            if not resumed and held <= {STATE, EVENTS} and not _record(self.folder, STATE).get("restarts"):
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
                except InputError:  # damaged, for example by a crash of the file system: prune the layer again
                    continue
                record = parse_json(metadata.get(KEY, "{}"))
                if record.pop("fingerprint", None) != self.fingerprint:
                    raise InputError("out", f"{self.layer_file(layer)} belongs to another run")
                try:
                    records[layer] = LayerRecord.read(record)
                except (KeyError, TypeError, ValueError) as error:
                    reason = "was written by another version; choose an empty directory"
                    raise InputError("out", f"{self.layer_file(layer)} {reason}") from error
        return records

    def write_layer(self, shapes: Shapes, tensor: Callable[[str], Tensor], record: LayerRecord) -> None:
        """Write the finished layer of a record; resumed runs skip it from then on."""
        whole = {"fingerprint": self.fingerprint, **record.plain()}
        names = {self._stored_name(name): name for name in shapes}
        stored = {key: shapes[name] for key, name in names.items()}
        metadata = {KEY: dump_json(whole)}
        write_each(self.folder, self.layer_file(record.layer), stored, lambda key: tensor(names[key]), metadata)

    def read_layer(self, layer: int, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors of a finished layer by name, one at a time."""
        for name, stored in self.stored_layer(layer, names).items():
            yield name, stored.read()

    def stored_layer(self, layer: int, names: Iterable[str]) -> dict[str, StoredTensor]:
        """Return tensors of a finished layer in its file, by name."""
        entries, _ = read_header(self.folder, self.layer_file(layer))
        return {name: StoredTensor(self.folder, entries[self._stored_name(name)]) for name in names}

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result and remove the state, which is no longer needed."""
        self.folder.write_json(RESULT, result)  # first: a directory with neither file is not recognised as a run
        self.folder.remove(STATE)


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
        record = folder.read_json(name)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
