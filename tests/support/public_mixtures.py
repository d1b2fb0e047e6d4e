"""Configs of public mixtures of experts, with the sizes that their authors have published."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

_MLA = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-235B-A22B": (
        "qwen3_moe",
        {
            **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94},
            **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 1536},
            **{"num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960},
        },
    ),
    "GLM-4.6": (
        "glm4_moe",
        {
            **{"vocab_size": 151552, "hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 92},
            **{"num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "moe_intermediate_size": 1536},
            **{"n_routed_experts": 160, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3},
            **{"use_qk_norm": True, "attention_bias": True, "max_position_embeddings": 202752},
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            **{"vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61},
            **{"num_attention_heads": 128, "num_key_value_heads": 128, **_MLA, "moe_intermediate_size": 2048},
            **{"n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "first_k_dense_replace": 3},
            **{"n_group": 8, "topk_group": 4, "max_position_embeddings": 163840},
        },
    ),
}


def public_config(name: str) -> PretrainedConfig:
    """The config of a public model, whose weights are bfloat16."""
    model_type, values = PUBLIC[name]
    return AutoConfig.for_model(model_type, **values, dtype="bfloat16")
