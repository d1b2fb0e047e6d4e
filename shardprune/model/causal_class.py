"""The class of a config's causal language model: transformers' own, or its text model with a head.

The text parts of some multimodal models (Qwen2.5-VL, Qwen3-VL) have no causal language model of their own in
transformers; the head is a part of the whole model's class. On text alone, that class passes nothing but the embedded
tokens and the attention mask on to the text model, which makes the positions in three dimensions itself, and adds no
visual features between its layers. So the text model with that head gives the same logits. The class of that of Llama
3.2 Vision is there, but transformers knows it by the config of the whole model alone.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

WITHOUT_HEAD = frozenset(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"))
BY_WHOLE = {"mllama_text_model": "mllama"}  # types of text parts, and of the whole whose config has their class
TEXT_PARTS = WITHOUT_HEAD | BY_WHOLE.keys()  # that transformers' automatic class does not build


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the causal language model of a config.

    Raises:
        KeyError: transformers has none.
    """
    if config.model_type in WITHOUT_HEAD:
        return _with_head(type(config))  # type: ignore[arg-type]  # a class is hashable
    if whole := BY_WHOLE.get(config.model_type):
        return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[whole]]
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@cache
def _with_head(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """Return the text model of a class of configs with a head; its attributes are those of the text model's class."""
    text_class = MODEL_MAPPING[config_class]

    class TextModelWithHead(text_class.__base__):  # type: ignore[name-defined]
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.model = text_class(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, logits_to_keep: int | torch.Tensor = 0, **inputs: Any) -> CausalLMOutputWithPast:
            outputs = self.model(**inputs)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
            return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    TextModelWithHead.__name__ = f"{text_class.__name__}WithHead"
    return TextModelWithHead
