"""Models that transformers builds from a config, without memory for their parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights

from shardprune.errors import InputError
from shardprune.model.causal_class import TEXT_PARTS, causal_class
from shardprune.model.config_file import deferred_warnings, in_one_line

LARGE = 2**28  # elements that no buffer has


def empty_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Build the causal language model of a config with parameters on the meta device and buffers on `device`.

    Raises:
        InputError: transformers builds no model from the config.
    """

    def build() -> PreTrainedModel:
        settings = {
            "dtype": dtype,
            "attn_implementation": attention_of(config),
            "experts_implementation": "eager",  # one expert after the other: others round differently
        }
        if config.model_type in TEXT_PARTS:
            return causal_class(config)._from_config(config, **settings)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)

    return _built(build, device)


def empty_multimodal_model(
    config: PretrainedConfig, language: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Build the model of a config that sees images, as `empty_model` does; `language` is its language model's config.

    Raises:
        InputError: transformers builds no model from the config.
    """

    def build() -> PreTrainedModel:
        settings = {"dtype": dtype, "attn_implementation": attention_of(language), "trust_remote_code": False}
        return AutoModelForImageTextToText.from_config(config, **settings)

    return _built(build, device)


def _built(build: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """Build a model with parameters on the meta device and buffers on `device`."""
    try:
        with _parameters_on_meta(), _LargeOnMeta(), no_init_weights(), deferred_warnings():
            model = build()
    except Exception as error:  # a bad config fails anywhere in the model's code, with any error
        raise InputError("model", f"its config.json makes no model: {in_one_line(error)}") from error
    if model.base_model is model and isinstance(getattr(model, "model", None), PreTrainedModel):
        model.base_model_prefix = "model"  # Llama 4 says that its text model is elsewhere
    model.tie_weights()  # not inside the context, which gives every assignment a parameter of its own
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules be made with their parameters on the meta device; buffers hold what they compute for them."""

    def moved(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(moved)  # type: ignore[arg-type]  # declared to return None
    try:
        yield
    finally:
        hook.remove()


class _LargeOnMeta(TorchFunctionMode):
    """Makes what is too large for a buffer on the meta device at once: all experts of a layer may be larger than the
    memory, and zeros are written (Llama 4)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = kwargs or {}
        if function in (torch.empty, torch.zeros) and settings.get("device") is None:
            made = function(*args, **{**settings, "device": "meta"})
            if made.numel() >= LARGE:
                return made
        return function(*args, **settings)


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that a checkpoint holds, by their names in the module."""
    buffers = dict(module.named_buffers())
    return {name: buffers[name] for name in module.state_dict() if name in buffers}


def dtypes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of an empty model's parameters and persistent buffers, by name, as transformers loads them.

    They differ from the `dtype` of the computation where a class creates a tensor in a dtype of its own, or keeps some
    in float32.
    """
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = model._get_dtype_plan(dtype)
    if kept:
        matching, pattern_of_group, _ = build_glob_alternation(list(kept))
        for name in dtypes:
            if (found := matching.search(name)) and found.lastgroup:
                dtypes[name] = kept[pattern_of_group[found.lastgroup]]
    return dtypes


def attention_of(config: PretrainedConfig) -> str:
    """Return the attention implementation of all runs of a model: rounding differs between implementations.

    It is `sdpa`, but `eager` if the model class has no sdpa or caps attention scores (Gemma 2): sdpa has no such term,
    and some versions of transformers drop it silently.
    """
    model_class = causal_class(config)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "sdpa" if model_class._supports_sdpa and not capped else "eager"
