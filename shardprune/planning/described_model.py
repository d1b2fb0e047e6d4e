"""What is known of a model that is planned for: its config, and the dtype of its weights, which are not read."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from shardprune.model.checkpoint import INDEX, SINGLE, Checkpoint, locate, place_of
from shardprune.model.config_file import CONFIG, config_fields, language_config, parse_config
from shardprune.model.fp8 import quantisation_of
from shardprune.model.opening import stored_dtype
from shardprune.storage.folder import Folder
from shardprune.storage.output_names import EXPORT
from shardprune.storage.whole_files import read_file


@dataclass(frozen=True)
class DescribedModel:
    """A model by its config.

    Attributes:
        config: of the language model.
        whole: of all, what the model has beside its language model included.
        dtype: in which weights are read.
        in_files: mean bytes of a weight in the files; None if these are not there.
        expected_fp8: the files, which are not there, will be FP8.
    """

    config: PretrainedConfig
    whole: PretrainedConfig
    dtype: torch.dtype
    in_files: float | None = None
    expected_fp8: bool = False


def read_description(name: str, field: str = "model") -> DescribedModel:
    """Read the config of a model, which a field of a recipe names, and the dtype of its weights: the stored one, or
    without weights the config's.

    Raises:
        InputError: there is no config, or the model is an export.
    """
    if name.endswith(".json"):
        return _parsed(read_file(name, field), name, field)
    url = locate(place_of(name))
    folder = Folder(url, field)
    weights = folder.is_file(SINGLE) or folder.is_file(INDEX)
    # An export has a config and no weights that a run would read: opening it says what to do.
    if not weights and folder.is_file(CONFIG) and not folder.is_file(EXPORT):
        return _parsed(folder.read_bytes(CONFIG), f"{url}/{CONFIG}", field)
    checkpoint = Checkpoint(name, field)
    stored = stored_dtype(checkpoint), checkpoint.bytes_of_fp8()
    return DescribedModel(checkpoint.config, checkpoint.whole_config, *stored)


def _parsed(content: bytes, name: str, field: str) -> DescribedModel:
    whole = parse_config(content, name, field)
    config = language_config(whole)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    fp8 = quantisation_of(config_fields(content), name, field) is not None
    return DescribedModel(config, whole, dtype, expected_fp8=fp8)
