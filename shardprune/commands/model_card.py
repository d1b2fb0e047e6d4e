"""The model card of an output: README.md as the hub reads it, made of the result alone.

The same run makes the same card: it says nothing of seconds, machines and paths. A card that somebody has changed stays
as it is.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import ModelCardData

from shardprune.errors import InputError, StorageError
from shardprune.model.auto_class import CAUSAL, auto_class_of
from shardprune.model.checkpoint import locate
from shardprune.model.config_file import raw_config
from shardprune.printable import printable
from shardprune.recipes.commands import RECIPES
from shardprune.recipes.groups import HUB_NAME
from shardprune.recipes.panels import panels_of
from shardprune.recipes.settings import Settings
from shardprune.report.result import Result
from shardprune.report.summary import EVALUATION_HEADINGS, evaluation_rows, summary_rows, what_was_done
from shardprune.storage.folder import Folder
from shardprune.storage.output_names import CARD, run_of
from shardprune.storage.relative_paths import LOCAL
from shardprune.storage.yaml_file import dump_yaml, parse_yaml

FRONT = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)  # of a card, in YAML
WORD = re.compile(r"[\w./:-]{1,200}")  # of a licence, its name and its address
OF_MACHINES = ("Output", "Workers", "Layout")  # panels of fields that shape no tensor
PARALLEL = ("propagation", "segments")  # fields of these that do, where shards are pruned at once
DTYPE = "dtype"  # and this one, of the weights of an FP8 checkpoint
OF_A_RUN = ("seconds", "workers", "peak memory", "restarts")  # rows of a summary that are no facts of the model


def leave_card(folder: Folder, result: Result, previous: Result | None = None) -> None:
    """Write the card of a result into its output, unless there is one that is not that of the previous result.

    Raises:
        StorageError: storage cannot be written.
    """
    base = _base_of(result.recipe["model"])
    auto_class = auto_class_of(str(raw_config(folder).get("model_type")))
    text = card(result, base, auto_class)
    if folder.is_file(CARD):
        held = folder.read_bytes(CARD)
        if held == text.encode() or previous is None or held != card(previous, base, auto_class).encode():
            return
    folder.write_text(CARD, text)


def card(result: Result, base: dict[str, Any], auto_class: str) -> str:
    """Return the text of a card.

    Args:
        base: what the hub's card of the model that was given says: `base_model`, its `license`, `license_name` and
            `license_link`, as far as they are known.
        auto_class: the class of transformers that loads the model.
    """
    done = ", ".join(what_was_done(result)) or result.command
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation" if auto_class == CAUSAL else "image-text-to-text",
        tags=["shardprune", *_tags(result)],
        **base,
    )
    name = base.get("base_model")
    title = f"{name.partition('/')[2]}: {done}" if name else f"Pruned model: {done}"
    of = f"[{name}](https://huggingface.co/{name})" if name else "a model that is not on the hub"
    licence = f"The base model's licence is `{base['license']}`." if "license" in base else "Its licence is not known."
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {printable(title)}\n",
        f"Made of {of} by `shardprune {result.command}`. {licence}\n",
        _table(("", "before", "after"), _facts(result)),
        *([_table(EVALUATION_HEADINGS, evaluation_rows(result.evaluation))] if result.evaluation else []),
        "## Load it\n",
        f"```python\nfrom transformers import {auto_class}, AutoTokenizer\n\n"
        f'model = {auto_class}.from_pretrained("THIS MODEL", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS MODEL")\n```\n',
        "## Repeat it\n",
        f"`shardprune {result.command} --recipe recipe.yaml --out OUT`, with this recipe:\n",
        f"```yaml\n{dump_yaml(repeated(result, name))}```\n",
    ]
    return "\n".join(parts)


def repeated(result: Result, base: str | None) -> dict[str, Any]:
    """Return the fields of a recipe that makes the same tensors again: those with another value than their default.

    Paths of this machine are cut to their last part.
    """
    settings = RECIPES[result.command]
    elsewhere = {
        field.name for panel in panels_of(settings) if panel.title in OF_MACHINES for field in panel.fields
    } - {DTYPE, *(PARALLEL if result.recipe.get("propagation") == "parallel" else ())}
    kept = {"model": base or _last(result.recipe["model"])}
    for name, value in result.recipe.items():
        if name in settings.model_fields and name not in elsewhere | {"model"} and not _default(settings, name, value):
            kept[name] = [_last(item) for item in value] if isinstance(value, list) else _last(value)
    return kept


def _default(settings: type[Settings], name: str, value: Any) -> bool:
    default = settings.model_fields[name].get_default()
    plain = [*default] if isinstance(default, tuple) else default
    return value == plain or (isinstance(plain, list) and len(plain) == 1 and value == plain[0])


def _last(value: Any) -> Any:
    """Return the last part of a path of this machine, or of a URL; other values as they are."""
    if not isinstance(value, str) or not (LOCAL.match(value) or "://" in value):
        return value
    return value.rstrip("/").rpartition("/")[2]


def _tags(result: Result) -> Iterator[str]:
    yield "pruned"
    if result.sparsity and result.sparsity.achieved > (result.sparsity.removed or 0.0):
        yield "sparse"
    pattern = result.recipe.get("pattern")
    if isinstance(pattern, str) and pattern != "unstructured":
        yield pattern
    if isinstance(result.recipe.get("method"), str):
        yield result.recipe["method"]


def _facts(result: Result) -> Iterator[tuple[str, ...]]:
    for row in summary_rows(result):
        if not row[0].startswith(OF_A_RUN):
            yield row


def _table(headings: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("|", "\\|")


def _base_of(model: str) -> dict[str, Any]:
    """Return what is known of the model on the hub that a model is, or was made of."""
    own = {"base_model": model} if HUB_NAME.fullmatch(model) and not os.path.isdir(model) else {}
    try:
        folder = Folder(locate(model), "model")
        if not own and not folder.is_file(CARD):
            folder = Folder(locate(run_of(model)), "model")
        front = FRONT.match(folder.read_text(CARD)) if folder.is_file(CARD) else None
        held = parse_yaml(front[1].encode()) if front else {}
    except (InputError, StorageError, ValueError):  # the card is for readers: one that cannot be read says nothing
        return own
    if not isinstance(held, dict):
        return own
    if not own and HUB_NAME.fullmatch(str(held.get("base_model"))):
        own = {"base_model": held["base_model"]}
    named = ("license", "license_name", "license_link")
    return own | {name: held[name] for name in named if isinstance(held.get(name), str) and WORD.fullmatch(held[name])}
