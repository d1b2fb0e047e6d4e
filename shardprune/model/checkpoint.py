"""Hugging Face checkpoints on any file system, read tensor by tensor."""

import hashlib
import os
import re
import tempfile
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from shardprune.errors import InputError, first_line
from shardprune.model.families import TOWERS
from shardprune.storage.folder import Folder, absolute
from shardprune.storage.json_file import dump_json, parse_json
from shardprune.storage.safetensors_file import Entry, StoredTensor, copy_tensors, read_elements, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# Files of a checkpoint beside the weights: configuration, tokenizer, chat template.
COMPANION = re.compile(
    r"(config|generation_config|preprocessor_config|processor_config|.*token.*|chat_template.*|vocab|merges)"
    r"\.(json|txt|model|jinja)"
)
SAMPLE = 1024  # bytes in the middle of every tensor that enter the checkpoint's identity


class Checkpoint:
    """A checkpoint's config and the locations of its tensors; weights are read on request.

    For a model with a language tower (LLaVA), `config` is the tower's, and its tensors have the names that they would
    have in a causal language model; `stored_name` maps them to the names in the files.

    Args:
        model: a local directory, a fsspec URL, or a hub name such as `meta-llama/Llama-3.1-8B`.
        field: the recipe's field that names it, for errors.

    Raises:
        InputError: there is no such checkpoint, or its files are damaged.
    """

    def __init__(self, model: str, field: str = "model") -> None:
        self.folder = Folder(locate(model, field), field)
        if not self.folder.is_file(CONFIG):
            raise InputError(field, f"{model!r} holds no {CONFIG}: give a checkpoint's directory, URL or hub name")
        stored = self._entries()
        prefixes = self._tower_prefixes(stored)
        self._stored = {_replace_prefix(name, prefixes): name for name in stored}
        self.entries = {name: stored[self._stored[name]] for name in self._stored}

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the language model, as transformers reads it."""
        return self._whole_config.get_text_config() if self.has_tower else self._whole_config

    @property
    def has_tower(self) -> bool:
        """Whether the language model is a part of a larger one."""
        return self._whole_config.model_type in TOWERS

    def stored_name(self, name: str) -> str:
        """Return the name in the files of tensor `name` of the causal language model."""
        return self._stored[name]

    def _tower_prefixes(self, stored: dict[str, Entry]) -> dict[str, str]:
        """Return the map from stored prefixes of the language tower's tensors to those used here; empty without a
        tower.
        """
        layouts = TOWERS[self._whole_config.model_type] if self.has_tower else ()
        return next((layout for layout in layouts if any(name.startswith(tuple(layout)) for name in stored)), {})

    @cached_property
    def _whole_config(self) -> PretrainedConfig:
        return parse_config(self.folder.read_bytes(CONFIG), f"{self.folder.url}/{CONFIG}", self.folder.field)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the checkpoint's tokenizer.

        Raises:
            InputError: there is none.
        """
        with tempfile.TemporaryDirectory() as local:  # transformers reads these files from a local path only
            for name in self.companions():
                Path(local, name).write_bytes(self.folder.read_bytes(name))
            try:
                return AutoTokenizer.from_pretrained(local, trust_remote_code=False)
            except Exception as error:  # each tokenizer class raises errors of its own
                reason = first_line(error).replace(local, self.folder.url)
                raise InputError(
                    self.folder.field, f"{self.folder.url} holds no tokenizer that loads: {reason}"
                ) from error

    def companions(self) -> list[str]:
        """Return the names of the files beside the weights that belong to a checkpoint (config, tokenizer, chat
        template).
        """
        return [name for name in self.folder.names() if COMPANION.fullmatch(name) and name != INDEX]

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        return self.stored(name).read()

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor in its file."""
        return StoredTensor(self.folder, self.entries[name])

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements `start` to `stop` of one tensor, counted in C order, [stop - start] in its stored dtype."""
        return read_elements(self.folder, self.entries[name], start, stop)

    def copy(self, names: list[str], target: Folder, file: str, metadata: dict[str, str]) -> None:
        """Copy tensors into a file of another folder, byte by byte."""
        entries = {self.stored_name(name): self.entries[name] for name in names}
        copy_tensors(self.folder, entries, target, file, metadata)

    def identity(self) -> str:
        """Return a hash that tells checkpoints apart: config, headers, and a sample of every tensor."""
        digest = hashlib.sha256(self.folder.read_text(CONFIG).encode())
        entries = sorted(self.entries.items())
        digest.update(dump_json([(name, str(entry.dtype), entry.shape) for name, entry in entries]).encode())
        for sample in self.folder.read_ranges([_sample(entry) for _, entry in entries]):
            digest.update(sample)
        return digest.hexdigest()

    def _entries(self) -> dict[str, Entry]:
        if self.folder.is_file(INDEX):
            return self._indexed_entries()
        if self.folder.is_file(SINGLE):
            return read_header(self.folder, SINGLE)[0]
        raise InputError(
            self.folder.field,
            f"{self.folder.url} holds neither {SINGLE} nor {INDEX}; other weight formats are not read",
        )

    def _indexed_entries(self) -> dict[str, Entry]:
        where = f"{self.folder.url}/{INDEX}"
        try:
            placed = TypeAdapter(dict[str, str]).validate_python(self.folder.read_json(INDEX)["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(self.folder.field, f"{where} cannot be read as an index of tensors") from error
        headers = {file: read_header(self.folder, file)[0] for file in sorted(set(placed.values()))}
        for name, file in placed.items():
            if name not in headers[file]:
                raise InputError(self.folder.field, f"{where} places {name} in {file}, which has no such tensor")
        return {name: headers[file][name] for name, file in placed.items()}


def parse_config(content: bytes, place: str, field: str = "model") -> PretrainedConfig:
    """Parse the content of a config.json.

    Args:
        place: path or URL of the file, for the error.

    Raises:
        InputError: transformers reads no config from it; names `field`.
    """
    with tempfile.TemporaryDirectory() as local:  # AutoConfig reads from a local path only
        file = Path(local, CONFIG)
        file.write_bytes(content)
        try:
            return AutoConfig.from_pretrained(local, trust_remote_code=False)
        except Exception as error:  # transformers checks a config in many ways, each with an error of its own
            reason = first_line(error).replace(str(file), place).replace(local, place)
            raise InputError(field, f"{place} cannot be read as a config: {reason}") from error


def _sample(entry: Entry) -> tuple[str, int, int]:
    """Return the range of bytes in the middle of a tensor."""
    middle = (entry.start + entry.end) // 2
    return entry.file, max(entry.start, middle - SAMPLE // 2), min(entry.end, middle + SAMPLE // 2)


def _replace_prefix(name: str, prefixes: dict[str, str]) -> str:
    for prefix, other in prefixes.items():
        if name.startswith(prefix):
            return other + name.removeprefix(prefix)
    return name


def locate(model: str, field: str = "model") -> str:
    """Return the URL or path of a checkpoint; a hub name becomes its cached snapshot, or `hf://` if there is none.

    Raises:
        InputError: it is neither a directory, a URL, nor in the form of a hub name.
    """
    if "://" in model or os.path.isdir(model):
        return model
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise InputError(field, f"{model!r} is no directory, no URL and no hub name (organisation/name)")
    return _cached_snapshot(model) or f"hf://{model}"


def _cached_snapshot(name: str) -> str | None:
    """Return the folder of a hub model if the local cache holds all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError):
        return None
    index = os.path.join(folder, INDEX)
    listed = parse_json(Path(index).read_bytes())["weight_map"].values() if os.path.isfile(index) else [SINGLE]
    complete = all(os.path.isfile(os.path.join(folder, name)) for name in {CONFIG, *listed})
    return folder if complete else None


def place_of(model: str) -> str:
    """Return a model's location in a form that every process of a run resolves alike: paths become absolute."""
    place = absolute(model)
    return place if os.path.isdir(place) else model
