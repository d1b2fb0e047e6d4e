"""Hugging Face checkpoints on any file system, read tensor by tensor."""

import copy
import hashlib
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from pydantic import BaseModel, JsonValue
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shardprune.errors import InputChanged, InputError
from shardprune.model.companions import check_companion, companions
from shardprune.model.config_file import CONFIG, language_config, parse_config, raw_config
from shardprune.model.families import TOWER_LAYOUTS, TOWERS
from shardprune.model.fp8 import Fp8Weights, quantisation_of, written_dtype
from shardprune.model.sources import Source, SourceState, SourceTensor
from shardprune.model.stored_names import places_in_model
from shardprune.model.ties import equal, tied_names
from shardprune.model.tokenizer import load_tokenizer
from shardprune.storage.folder import Folder
from shardprune.storage.joined_tensors import JoinedEntry
from shardprune.storage.json_file import dump_json, parse_model
from shardprune.storage.locations import absolute
from shardprune.storage.malformed import located, shown
from shardprune.storage.output_names import EXPORT
from shardprune.storage.safetensors_file import Entry, StoredTensor, read_header
from shardprune.storage.scaled_tensors import ScaledEntry, opened
from shardprune.storage.stacks import Place

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of low-rank updates that peft keeps beside, or instead of, the weights
SAMPLE = 1024  # bytes in the middle of every tensor that enter the checkpoint's identity


class Checkpoint:
    """A checkpoint's config and the locations of its tensors; weights are read on request.

    Tensors have the names that they have in the causal language model; `stored_name` maps them to the names in the
    files. For a model with a language tower (LLaVA), `config` is the tower's.

    Input embedding and head are tied as transformers ties them: if the config says so, and the files hold one of the
    two, or both with the same values. `config` says what is true of the files.

    The weights of an FP8 checkpoint are read as products with their scales: its tensors are those of the model from
    which it was made, rounded, and the config that transformers reads is that model's.

    Attributes:
        entries: where its tensors are, by their names in the causal language model, with the dtypes in which they are
            read.
        files: where the tensors of its files are, by their names there.
        own_head: the files hold a head of its own although the config ties it.
        fp8: how FP8 weights are read; None where they are not.

    Args:
        model: a local directory, a fsspec URL, or a hub name such as `meta-llama/Llama-3.1-8B`.
        field: the recipe's field that names it, for errors.
        dtype: in which FP8 weights are read; None: the config's, which is bfloat16 in most.

    Raises:
        InputError: there is no such checkpoint, or its files are damaged.
    """

    def __init__(self, model: str, field: str = "model", dtype: torch.dtype | None = None) -> None:
        self.folder = Folder(locate(model, field), field)
        if not self.folder.is_file(CONFIG):
            raise InputError(field, f"{model!r} holds no {CONFIG}: give a checkpoint's directory, URL or hub name")
        check_companion(self.folder, CONFIG)
        beside = self.companions()
        weights = [name for name in self.folder.names() if name.endswith(".safetensors")]
        self.source = Source(self.folder, [CONFIG, INDEX, *beside, *weights])  # before any of them is read
        stored = self._entries()
        self.source.keep([CONFIG, INDEX, *beside, *{entry.file for entry in stored.values()}])
        self.files = stored
        self.fp8 = self._fp8(dtype)
        scales = self.fp8.companions(stored) if self.fp8 else {}
        self._places: dict[str, Place] = {}
        for place, name in self._places_in_model({name: stored[name] for name in stored if name not in scales}):
            if self._places.setdefault(name, place) is not place:
                raise InputError(field, f"{self.folder.url} holds {place} under two names")
        self.entries = {name: self.entry_at(place, stored) for name, place in self._places.items()}
        self.own_head = self._settle_ties()

    def _fp8(self, dtype: torch.dtype | None) -> Fp8Weights | None:
        """Return how FP8 weights are read, where the checkpoint has them."""
        place, field = f"{self.folder.url}/{CONFIG}", self.folder.field
        config = quantisation_of(raw_config(self.folder), place, field)
        if config is None:
            return None
        return Fp8Weights(config, dtype or written_dtype(self.config.dtype), self.folder.url, field)

    def entry_at(self, place: Place, files: Mapping[str, Entry]) -> Entry:
        """Return where the tensor at a place is among stored ones, these or those of an output with the same names.

        Raises:
            InputError: it is an FP8 weight without scales that fit it.
        """
        return self.fp8.entry(place, files) if self.fp8 else place.entry(files)

    def as_stored(self) -> "Checkpoint":
        """Return the checkpoint whose tensors are read as they are stored: FP8 weights, and their scales besides.

        Raises:
            InputError: scales are of several experts.
        """
        if self.fp8 is None:
            return self
        whole = copy.copy(self)
        whole.fp8 = None
        whole._places = self._places | self.fp8.places_of_scales(self._places, self.files)
        whole.entries = {name: place.entry(self.files) for name, place in whole._places.items()}
        return whole

    def bytes_of_fp8(self) -> float | None:
        """Return the mean bytes in the files of a weight of an FP8 checkpoint, scales included; None for others."""
        if self.fp8 is None:
            return None
        stored = sum(entry.size for entry in self.as_stored().entries.values())
        return stored / sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the language model, as transformers reads it."""
        return self._language_config

    @property
    def whole_config(self) -> PretrainedConfig:
        """The configuration of the model that the language model is a part of, or its own."""
        return self._whole_config

    @cached_property
    def _language_config(self) -> PretrainedConfig:
        return language_config(self._whole_config)

    def _settle_ties(self) -> bool:
        """Decide whether input embedding and head are one tensor; return whether the files contradict the config.

        A head that is there alone becomes the embedding.
        """
        names = tied_names(self.config)
        if names is None:
            return False
        embedding, head = names
        if head in self.entries and embedding not in self.entries:
            self.entries[embedding] = self.entries.pop(head)
            self._places[embedding] = self._places.pop(head)
        if head not in self.entries or equal(self.stored(embedding), self.stored(head)):
            return False
        self.config.tie_word_embeddings = False
        return True

    def notes(self) -> list[str]:
        """Return what was decided about the files where they allow more than one reading, a line each."""
        url, found = self.folder.url, []
        if self.folder.is_file(ADAPTER):
            found.append(f"{url} holds weights and an adapter: the weights are taken, the adapter is not applied")
        if self.own_head:
            found.append(f"{url}: its config ties the embeddings, but it holds a head of its own, which is taken")
        if self.fp8:
            dtype = str(self.fp8.dtype).removeprefix("torch.")
            found.append(f"{url}: its FP8 weights are multiplied with their scales as they are read, to {dtype}")
        return found

    @property
    def has_tower(self) -> bool:
        """Whether the language model is a part of a larger one."""
        return self._whole_config.model_type in TOWERS

    def stored_name(self, name: str) -> str:
        """Return the name in the files of tensor `name` of the causal language model, or of the one that it is a part
        of."""
        return self._places[name].name

    def place(self, name: str) -> Place:
        """Return the place in the files of tensor `name` of the causal language model."""
        return self._places[name]

    def _places_in_model(self, stored: dict[str, Entry]) -> Iterator[tuple[Place, str]]:
        """Yield the places of tensors in the files, with their names in the causal language model."""
        if not self.has_tower:
            yield from places_in_model(self.config, stored)
            return
        counts = [sum(name.startswith(tuple(layout)) for name in stored) for layout in TOWER_LAYOUTS]
        prefixes = TOWER_LAYOUTS[counts.index(max(counts))]
        of_tower = {_replace_prefix(name, prefixes): name for name in stored if name.startswith(tuple(prefixes))}
        for place, name in places_in_model(self.config, {name: stored[old] for name, old in of_tower.items()}):
            yield replace(place, name=of_tower[place.name]), name
        yield from ((Place(name), name) for name in stored if not name.startswith(tuple(prefixes)))

    @cached_property
    def _whole_config(self) -> PretrainedConfig:
        return parse_config(self.folder.read_bytes(CONFIG), f"{self.folder.url}/{CONFIG}", self.folder.field)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the checkpoint's tokenizer.

        Raises:
            InputError: there is none, or it does not work.
        """
        return load_tokenizer(self.folder)

    def companions(self) -> list[str]:
        """Return the names of the files beside the weights that belong to a checkpoint (config, tokenizer, chat
        template).

        Raises:
            InputError: one of them is a link that leaves the folder, no file, or too large.
        """
        return companions(self.folder)

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype."""
        return self.stored(name).read()

    def stored(self, name: str) -> StoredTensor:
        """Return a tensor in its file."""

        def plain(entry: Entry, place: str) -> StoredTensor:
            return SourceTensor(self.folder, entry, place, self.source)

        return opened(self.folder, self.entries[name], plain, str(self._places[name]))

    def read_elements(self, name: str, start: int, stop: int) -> Tensor:
        """Read elements `start` to `stop` of one tensor, counted in C order, [stop - start] in its stored dtype."""
        return self.stored(name).read_elements(start, stop)

    def check_unchanged(self, names: Iterable[str] | None = None) -> None:
        """Check that the files of some tensors, or all files, are still those that were opened.

        Raises:
            InputChanged: one is not.
        """
        self.source.check(None if names is None else {file for name in names for file in self.entries[name].files})

    def state(self) -> SourceState:
        """Return what other processes and later attempts of a run must know to notice a change."""
        state = self.source.state(self.identity())
        return replace(state, fp8_as=str(self.fp8.dtype).removeprefix("torch.")) if self.fp8 else state

    def identity(self) -> str:
        """Return a hash that tells checkpoints apart: config, headers, and a sample of every tensor, when it was first
        asked for."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256(self.folder.read_text(CONFIG).encode())
        entries = sorted(self.entries.items())
        digest.update(dump_json([(name, str(entry.dtype), entry.shape) for name, entry in entries]).encode())
        scales = [entry.scales for _, entry in entries if isinstance(entry, ScaledEntry)]
        joined = [part for _, entry in entries if isinstance(entry, JoinedEntry) for part in entry.parts[1:]]
        sampled = [*dict(entries).values(), *scales, *joined]
        for sample in self.folder.read_ranges([_sample(entry) for entry in sampled]):
            digest.update(sample)
        return digest.hexdigest()

    def _entries(self) -> dict[str, Entry]:
        named = getattr(self._whole_config, "transformers_weights", None)
        if named is not None:  # what transformers would load, and could not find in an output
            place = f"{self.folder.url}/{CONFIG}"
            reason = f"names weights of its own, transformers_weights: {shown(named)}; remove that field"
            raise InputError(self.folder.field, f"{place} {reason}")
        if self.folder.is_file(SINGLE):  # before an index, as transformers does: one may be left of other files
            return read_header(self.folder, SINGLE)[0]
        if self.folder.is_file(INDEX):
            return self._indexed_entries()
        if self.folder.is_file(ADAPTER):
            reason = "an adapter without the weights that it belongs to; merge it into its base model first"
        elif self.folder.is_file(EXPORT):
            reason = "an export; `shardprune export --restore` makes a checkpoint of it"
        else:
            reason = f"neither {SINGLE} nor {INDEX}; other weight formats are not read"
        raise InputError(self.folder.field, f"{self.folder.url} holds {reason}")

    def _indexed_entries(self) -> dict[str, Entry]:
        placed = _read_index(self.folder)
        headers = {file: read_header(self.folder, file)[0] for file in sorted(set(placed.values()))}
        for name, file in placed.items():
            if name not in headers[file]:
                where = f"{self.folder.url}/{INDEX}"
                raise InputError(self.folder.field, f"{where} places {name} in {file}, which has no such tensor")
        # An index may leave tensors of its files out, which transformers reads all the same.
        inside = {name: entry for header in headers.values() for name, entry in header.items()}
        return inside | {name: headers[file][name] for name, file in placed.items()}


def reopened(model: str, state: SourceState | None, field: str = "model") -> Checkpoint:
    """Open a checkpoint that another process of the run has opened, as its `state` says.

    Raises:
        InputChanged: it is not the same any more.
    """
    if state is None:
        return Checkpoint(model, field)
    try:
        checkpoint = Checkpoint(model, field, getattr(torch, state.fp8_as) if state.fp8_as else None)
    except InputError as error:
        raise InputChanged(field, f"the model changed under the run: {error.problem}") from error
    checkpoint.source.admit(state, checkpoint.identity)
    return checkpoint


class _Index(BaseModel):
    """The content of an index: the file of each tensor, and facts without which transformers reads none."""

    metadata: dict[str, JsonValue]
    weight_map: dict[str, str]


def _read_index(folder: Folder) -> dict[str, str]:
    """Return the file of each tensor.

    Raises:
        InputError: the index cannot be read, or names a file outside the folder; names the folder's field.
    """
    where = f"{folder.url}/{INDEX}"
    with located(folder.field, where):
        placed = parse_model(folder.read_bytes(INDEX), _Index).weight_map
    for file in placed.values():
        if not is_plain_name(file):
            raise InputError(folder.field, f"{where} names {file!r}, which is no file of that folder")
    return placed


def is_plain_name(file: str) -> bool:
    """Return whether a name is that of a file directly inside a folder, on every file system."""
    return file not in ("", ".", "..") and not any(mark in file for mark in "/\\\0")


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
    return _cached_snapshot(model, field) or f"hf://{model}"


def _cached_snapshot(name: str, field: str) -> str | None:
    """Return the folder of a hub model if the local cache holds all of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, local_files_only=True)
    except (LocalEntryNotFoundError, ValueError):
        return None
    present = {name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))}
    files = {SINGLE}
    if SINGLE not in present and INDEX in present:
        files = set(_read_index(Folder(folder, field)).values())
    return folder if present >= {CONFIG, *files} else None


def place_of(model: str) -> str:
    """Return a model's location in a form that every process of a run resolves alike: paths become absolute."""
    place = absolute(model)
    return place if os.path.isdir(place) else model
