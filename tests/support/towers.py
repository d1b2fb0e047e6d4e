"""Tiny configs of multimodal models whose language tower is a causal language model of its own."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from shardprune.model.empty_model import persistent_buffers
from tests.support.architectures import CARRYING, DENSE, MIXED, MIXTURES, VOCABULARY

_VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
_QWEN_VISION = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32},
    **{"num_position_embeddings": 16},
}
_QWEN_TOKENS = {
    name: VOCABULARY - place
    for place, name in enumerate(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), start=1
    )
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_THREE_DIMENSIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_QWEN_TEXT = {**DENSE["ernie4_5"], **_THREE_DIMENSIONS}
_OLDER_VISION = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
_DEEPSTACK_VISION = {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]}
_TAKEN = VOCABULARY - 1  # the token of an image
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        **{"text_config": {**DENSE["gemma3_text"], "model_type": "gemma3_text"}, "vision_config": _VISION},
        **{"mm_tokens_per_image": 4, "image_token_index": _TAKEN, "boi_token_index": 62, "eoi_token_index": 61},
    },
    "gemma4": {
        "text_config": {**CARRYING["gemma4_text"], "model_type": "gemma4_text", "pad_token_id": 2},
        "vision_config": {
            **{**_VISION, "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 8},
            "pooling_kernel_size": 1,
        },
        **{"audio_config": None, "image_token_id": _TAKEN, "video_token_id": 62, "audio_token_id": 61},
        **{"boi_token_id": 60, "eoi_token_id": 60, "boa_token_id": 60, "eoa_token_index": 60},
    },
    "internvl": {
        "text_config": {**DENSE["ernie4_5"], "model_type": "qwen2"},
        "vision_config": {**_VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": _TAKEN,
    },
    "llama4": {
        "text_config": {**MIXTURES["llama4_text"], "model_type": "llama4_text"},
        "vision_config": {
            **{**_VISION, "vision_output_dim": 24, "projector_input_dim": 24, "projector_output_dim": 24},
            "model_type": "llama4_vision_model",
        },
        "image_token_index": _TAKEN,
    },
    "mistral3": {
        "text_config": {**DENSE["ministral3"], "model_type": "ministral3"},
        "vision_config": {**_VISION, "model_type": "pixtral", "image_size": 16, "patch_size": 2},
        "image_token_index": _TAKEN,
    },
    "mllama": {  # of whose layers two attend to images
        "text_config": {
            **{**DENSE["apertus"], "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            "model_type": "mllama_text_model",
        },
        "vision_config": {
            **{**_VISION, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32},
            "intermediate_layers_indices": [0],
        },
        "image_token_index": VOCABULARY,  # a row of the input embedding beyond those of the head
    },
    "qwen3_5": {
        "text_config": {**MIXED["qwen3_5_text"], "model_type": "qwen3_5_text"},
        "vision_config": _QWEN_VISION,
        **_QWEN_TOKENS,
    },
    "qwen3_5_moe": {
        "text_config": {**MIXTURES["qwen3_5_moe_text"], "model_type": "qwen3_5_moe_text"},
        "vision_config": _QWEN_VISION,
        **_QWEN_TOKENS,
    },
    "qwen2_vl": {
        "text_config": {**_QWEN_TEXT, "model_type": "qwen2_vl_text", "tie_word_embeddings": True},
        "vision_config": _OLDER_VISION,
        **_QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {
            **{**_QWEN_TEXT, "model_type": "qwen2_5_vl_text", "use_sliding_window": True, "sliding_window": 8},
            **{"max_window_layers": 1},
        },
        "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [1], "window_size": 56},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_QWEN_TEXT, "model_type": "qwen3_vl_text"},
        "vision_config": _DEEPSTACK_VISION,
        **_QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": {**_QWEN_TEXT, **_EXPERTS, "model_type": "qwen3_vl_moe_text"},
        "vision_config": _DEEPSTACK_VISION,
        **_QWEN_TOKENS,
    },
}

# Whose vision tower is a model of the package timm, one that it has for tests.
OF_TIMM: dict[str, dict[str, Any]] = {
    "gemma3n": {
        "text_config": {**CARRYING["gemma3n_text"], "model_type": "gemma3n_text"},
        "vision_config": {"architecture": "test_byobnet", "hidden_size": 256, "vocab_size": 1, "vocab_offset": 62},
        "audio_config": {
            **{"hidden_size": 16, "input_feat_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1},
            **{"sscp_conv_channel_size": [4, 2], "vocab_size": 1, "vocab_offset": _TAKEN},
        },
        **{"image_token_id": 62, "boi_token_id": 61, "eoi_token_id": 61},
        **{"audio_token_id": _TAKEN, "boa_token_id": 60, "eoa_token_id": 60},
    },
}


def make_tower(
    folder: Path,
    model_type: str,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    **saving: Any,
) -> str:
    """Save a tiny random multimodal model whose layers and persistent buffers all matter, by further fields of its
    parts' configs."""
    torch.manual_seed(0)
    fields = {**TOWERS, **OF_TIMM}[model_type]
    parts = {"text_config": text or {}, "vision_config": vision or {}}
    config = fields | {name: {**fields[name], **more} for name, more in parts.items()}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **config))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.data.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.1)
    for buffer in persistent_buffers(model).values():
        buffer.add_(torch.randn(buffer.shape).to(buffer.dtype))
    model.save_pretrained(folder, **saving)
    return str(folder)
