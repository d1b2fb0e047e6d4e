"""Models of transformers from an export: the weights are unpacked into memory, and never written."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from shardprune.errors import InputError
from shardprune.model.companions import GENERATION
from shardprune.model.config_file import CONFIG, in_one_line, parse_config, raw_config
from shardprune.model.exports import open_export, open_weights
from shardprune.model.families import TOWERS
from shardprune.model.fp8 import Fp8Weights, quantisation_of, written_dtype
from shardprune.model.semi_structured import check_device, to_semi_structured
from shardprune.storage.local_copies import local_copies


def load_exported(
    place: str, *, device: str | torch.device = "cpu", semi_structured: bool | None = None, **settings: Any
) -> PreTrainedModel:
    """Return the causal language model of an export, its weights those of the checkpoint to the bit; of an FP8
    checkpoint, products with their scales.

    The host's memory holds the model once, and the largest tensor; then it moves to the device.

    Args:
        place: directory, URL or hub name of the export.
        semi_structured: compress 2:4 weights for torch's kernels, on a CUDA device; None where the format
            of the export says so.
        settings: further arguments of transformers' `from_pretrained`, such as `dtype` or `attn_implementation`.

    Raises:
        InputError: there is no whole export, the device lacks kernels for 2:4, or transformers makes no model of it.
    """
    folder, export = open_export(place, "place")
    weights = open_weights(folder, export)
    compressed = export.format == "semi-structured" if semi_structured is None else semi_structured
    if compressed:
        check_device(torch.device(device))
    where = f"{folder.url}/{CONFIG}"
    config = parse_config(folder.read_bytes(CONFIG), where, "place")
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if config.model_type in TOWERS else MODEL_FOR_CAUSAL_LM_MAPPING
    state = {name: file.tensor(name) for file in weights.values() for name in file.record.tensors}
    if quantisation := quantisation_of(raw_config(folder), where, "place"):
        state = Fp8Weights(quantisation, written_dtype(config.dtype), folder.url, "place").products(state)
    settings = {"dtype": "auto", **settings}
    try:
        model = classes[type(config)].from_pretrained(None, config=config, state_dict=state, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError("place", f"transformers makes no model of {folder.url}: {in_one_line(error)}") from error
    if folder.is_file(GENERATION):
        with local_copies({GENERATION: folder.read_bytes(GENERATION)}) as local:
            model.generation_config = GenerationConfig.from_pretrained(local)
    model = model.to(device).eval()
    return to_semi_structured(model) if compressed else model
