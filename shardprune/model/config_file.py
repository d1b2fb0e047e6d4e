"""The file config.json of a checkpoint: its sizes are checked before transformers reads it."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, cast

import transformers
from pydantic import BaseModel, BeforeValidator, Field
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from shardprune.errors import InputError
from shardprune.model.causal_class import TEXT_PARTS
from shardprune.model.families import TOWERS
from shardprune.model.fp8 import quantisation_of
from shardprune.storage.folder import Folder
from shardprune.storage.json_file import dump_json, fitting, parse_json
from shardprune.storage.local_copies import local_copies
from shardprune.storage.malformed import located

CONFIG = "config.json"
REASON = 300  # characters that are shown of the error of another library or program


def _largest(value: Any) -> Any:
    """Return the largest of the numbers of a list by layer; other values as they are."""
    whole = isinstance(value, list) and value and all(isinstance(one, int) for one in value)
    return max(value) if whole else value


Experts = Annotated[Annotated[int, Field(ge=0, le=2**14)] | None, BeforeValidator(_largest)]  # of a layer


class _Sizes(BaseModel):
    """Fields by which transformers makes lists and buffers in memory, and those that would make nothing.

    A model is built from a config before its tensors are compared with it. The bounds are far above any model's and
    keep that a matter of seconds.
    """

    num_hidden_layers: int | None = Field(None, ge=1, le=2000)
    hidden_size: int | None = Field(None, ge=1, le=2**20)
    head_dim: int | None = Field(None, ge=1, le=2**20)
    num_attention_heads: int | None = Field(None, ge=1, le=2**20)
    num_key_value_heads: int | None = Field(None, ge=1, le=2**20)
    vocab_size: int | None = Field(None, ge=1, le=2**31)
    max_position_embeddings: int | None = Field(None, ge=1, le=2**31)
    num_experts: Experts = None
    num_local_experts: Experts = None
    n_routed_experts: Experts = None
    moe_num_experts: Experts = None
    num_labels: int | None = Field(None, ge=0, le=2**20)
    partial_rotary_factor: int | float | None = Field(None, gt=0, le=1)


class _File(_Sizes):
    """A config.json, as far as it is looked at here."""

    model_type: str
    tie_word_embeddings: bool | None = None
    text_config: _Sizes | None = None
    vision_config: _Sizes | None = None


def config_fields(content: bytes) -> dict[str, Any]:
    """Return the fields of the content of a config.json.

    Some numbers are infinite, as limits of time steps (Mamba), which Python and so transformers write as no JSON has
    them.

    Raises:
        Malformed: it is no JSON otherwise.
    """
    return cast(dict[str, Any], parse_json(content, infinities=True))


def raw_config(folder: Folder) -> dict[str, Any]:
    """Return the fields of a checkpoint's config.json as they are in the file.

    Raises:
        Malformed: see `config_fields`.
    """
    return cast(dict[str, Any], folder.read_json(CONFIG, infinities=True))


def config_text(fields: Mapping[str, Any]) -> str:
    """Return the content of a config.json with some fields, which `config_fields` reads again."""
    return dump_json(fields, indent=1, infinities=True) + "\n"


def parse_config(content: bytes, place: str, field: str = "model") -> PretrainedConfig:
    """Parse the content of a config.json.

    Of an FP8 checkpoint, it is that of the model with weights that are not quantised.

    Args:
        place: path or URL of the file, for the error.

    Raises:
        InputError: transformers has no causal language model of it, or reads no config from it; names `field`.
    """
    with located(field, place):
        fields = config_fields(content)
        model_type = fitting(fields, _File).model_type
        fp8 = quantisation_of(fields, place, field)
    _check_type(model_type, field)
    with local_copies({CONFIG: content}) as local, deferred_warnings():
        try:
            config = AutoConfig.from_pretrained(local, trust_remote_code=False)
            _check_rope(language_config(config))
        except Exception as error:  # transformers checks a config in many ways, each with an error of its own
            reason = in_one_line(error).replace(f"{local}/{CONFIG}", place).replace(local, place)
            raise InputError(field, f"{place} cannot be read as a config: {reason}") from error
    if fp8:
        del config.quantization_config
    if model_type in TOWERS:
        if (language := language_config(config).model_type) not in TEXT_PARTS:
            _check_type(language, field)
    elif _has_other_parts(config):
        raise _other_parts(model_type, field)
    return config


def _check_type(model_type: str, field: str) -> None:
    """Check that transformers has a causal language model of a `model_type`, and that it is no part of a larger model.

    Raises:
        InputError: names `field`.
    """
    if model_type in TOWERS:
        return
    if model_type not in CONFIG_MAPPING_NAMES:
        reason = f"is not known to transformers {transformers.__version__}"
        raise InputError(field, f"model_type {model_type!r} {reason}; another version may know it")
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise _other_parts(model_type, field)
    raise InputError(field, f"model_type {model_type!r} has no causal language model in transformers")


def _has_other_parts(config: PretrainedConfig) -> bool:
    try:
        return config.get_text_config() is not config
    except ValueError:  # several of its parts are language models
        return True


def _other_parts(model_type: str, field: str) -> InputError:
    known = ", ".join(sorted(TOWERS))
    reason = "has other parts beside its language model (vision, audio)"
    return InputError(field, f"model_type {model_type!r} {reason}; of such models only {known} are supported")


def _check_rope(config: PretrainedConfig) -> None:
    """Check that transformers has the rotary embeddings of a config, which it looks for when it builds the model.

    Raises:
        ValueError: it has not.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = parameters if isinstance(parameters, dict) and "rope_type" not in parameters else {"": parameters}
    for values in kinds.values():  # one for each type of layer in some families
        kind = values.get("rope_type", "default") if isinstance(values, dict) else "default"
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(f"rope_type is {kind!r}; use one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that describes the language model; of one without a tower, the config itself.

    Whether input embedding and head are one tensor is a matter of the model that holds both, so that a tower's flag
    is that of the whole config.
    """
    if config.model_type not in TOWERS:
        return config
    language = config.get_text_config()
    language.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # some have no such field (Llama 3.2)
    return language


def with_changes(
    raw: dict[str, Any], changes: dict[str, Any], *, tower: bool, untied: bool, dtype: str | None = None
) -> dict[str, Any]:
    """Return the content of a config.json with other values of some fields.

    Args:
        changes: of fields of the language model's config.
        tower: the file describes a larger model, of which the language model is a part.
        untied: say that the head is a tensor of its own.
        dtype: of weights that are not quantised any more; None where nothing of the kind has changed.
    """
    if dtype:
        raw = {name: value for name, value in raw.items() if name not in ("quantization_config", "torch_dtype")}
        raw["dtype"] = dtype
    flag = {"tie_word_embeddings": False} if untied else {}
    if tower and "text_config" in raw:  # older files of Qwen2.5-VL have all fields side by side
        return {**raw, **flag, "text_config": {**raw["text_config"], **changes, **flag}}
    return {**raw, **changes, **flag}


def in_one_line(error: BaseException) -> str:
    """Return an error's text in one line of bounded length; the name of its class if it has no text."""
    return shortened(" ".join(str(error).split()) or type(error).__name__)


def shortened(line: str) -> str:
    """Return a line of another library or program, cut off where it is long."""
    return line if len(line) <= REASON else f"{line[:REASON]}..."


@contextmanager
def deferred_warnings() -> Iterator[None]:
    """Pass transformers' warnings on when the block has succeeded; where it fails, its error says more in one line."""
    transformers.logging.get_verbosity()  # installs the library's own handler, if nothing has done so
    logger, held = logging.getLogger("transformers"), _Held()
    handlers, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [held], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagate
    for record in held.records:
        logger.handle(record)


class _Held(logging.Handler):
    """A handler that keeps its records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
