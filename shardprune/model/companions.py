"""The files of a checkpoint beside its weights: configs, tokenizer, chat template.

They are copied into every output and given to the tokenizer, so that they are a list of names, each a file of limited
size inside the folder, and the templates in a folder of their own. Anything else that lies there stays where it is.
"""

import os
import re

from fsspec.implementations.local import LocalFileSystem
from pydantic import JsonValue
from transformers import GenerationConfig

from shardprune.errors import InputError
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import parse_model
from shardprune.storage.local_copies import local_copies
from shardprune.storage.malformed import located

GENERATION = "generation_config.json"
# Tokenizers, as transformers, sentencepiece, tiktoken and Mistral write them.
TOKENIZER = frozenset(
    {
        "added_tokens.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "spm.model",
        "tekken.json",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
NAMES = frozenset(
    {
        "config.json",
        GENERATION,
        *TOKENIZER,
        # chat templates
        "chat_template.jinja",
        "chat_template.json",
        # processors of models that read more than text
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    }
)
TEMPLATES = "additional_chat_templates"  # folder of chat templates beside the usual one: for tools, for retrieval
TEMPLATE = re.compile(rf"{TEMPLATES}/[\w-][\w.-]*\.jinja")
LARGEST = 2**28  # bytes; tokenizers of a quarter of a million tokens have 2**25


def has_tokenizer(folder: Folder) -> bool:
    """Return whether a checkpoint has any file of a tokenizer."""
    return not TOKENIZER.isdisjoint(folder.names())


def companions(folder: Folder) -> list[str]:
    """Return the names of the files beside the weights that belong to a checkpoint, those of its folder of templates
    with the folder.

    Raises:
        InputError: one of them is a link that leaves the folder, no file, or too large; names the folder's field.
    """
    found = folder.names()
    names = [name for name in found if name in NAMES]
    if TEMPLATES in found:
        inside = Folder(f"{folder.url.rstrip('/')}/{TEMPLATES}", folder.field)
        names += [path for name in inside.names() if is_template(path := f"{TEMPLATES}/{name}")]
    for name in names:
        check_companion(folder, name)
    return names


def is_template(name: str) -> bool:
    """Return whether a name is that of a file in the folder of templates."""
    return TEMPLATE.fullmatch(name) is not None


def check_configs(folder: Folder, names: list[str]) -> None:
    """Check that the configs among a checkpoint's files are JSON objects, and that transformers reads the settings of
    generation: it loads no output with others.

    Raises:
        InputError: one is not; names the folder's field.
    """
    for name in names:
        if name.endswith("_config.json"):
            place = f"{folder.url}/{name}"
            with located(folder.field, place):
                content = folder.read_bytes(name)
                parse_model(content, dict[str, JsonValue])
            if name == GENERATION:
                _check_generation(content, place, folder.field)


def _check_generation(content: bytes, place: str, field: str) -> None:
    with local_copies({GENERATION: content}) as local, deferred_warnings():
        try:
            GenerationConfig.from_pretrained(local)
        except Exception as error:  # it checks its fields in many ways, each with an error of its own
            raise InputError(field, f"{place} cannot be read: {in_one_line(error)}") from error


def check_companion(folder: Folder, name: str) -> None:
    """Check that a file beside the weights is a file inside the folder, of limited size.

    A snapshot in the hub's cache consists of links to the blobs beside it, which are its own files.

    Raises:
        InputError: it is not; names the folder's field.
    """
    place = f"{folder.url}/{name}"
    if isinstance(folder.fs, LocalFileSystem) and not _inside(folder.root, name):
        raise InputError(folder.field, f"{place} is a link that leaves the folder; put the file itself there")
    size = folder.size(name)
    if size is None:
        raise InputError(folder.field, f"{place} is not a file")
    if size > LARGEST:
        raise InputError(folder.field, f"{place} has {size} bytes; such a file has at most {LARGEST}")


def _inside(root: str, name: str) -> bool:
    """Return whether a local file, with all links followed, is below `root` or a blob of the snapshot `root`."""
    real, target = os.path.realpath(root), os.path.realpath(os.path.join(root, name))
    homes = [real]
    repository, snapshots = os.path.split(os.path.dirname(real))
    if snapshots == "snapshots":
        homes.append(os.path.join(repository, "blobs"))
    return any(os.path.commonpath([home, target]) == home for home in homes)
