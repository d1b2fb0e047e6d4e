"""Tiny configs of architectures that have no row in the table of families, by their `model_type`.

Those of `DENSE` are pruned by their weights, all of their layers' matrices; those of `MIXED`, whose layers are of
several kinds or have mixers other than attention, keep some matrices as they are; those of `MIXTURES` have experts;
those of `CARRYING` pass more than hidden states from layer to layer.
Those of `REFUSED` are not pruned, for a reason that its pattern says.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shardprune.model.empty_model import persistent_buffers

VOCABULARY = 64
EXPERTS = 4
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_HEAD = {**_COMMON, "head_dim": 12}  # not the hidden size over the number of heads
_WINDOW = {"sliding_window": 8}  # shorter than the sequences of the tests
_ONE_OF_EACH = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    **_COMMON,
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8},
    **{"v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
}
_LINEAR_ATTENTION = {
    **{"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
    **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
}

DENSE: dict[str, dict[str, Any]] = {
    "apertus": _COMMON,
    "arcee": _COMMON,
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "cohere": {**_COMMON, "logit_scale": 1.0},
    "cohere2": {**_HEAD, "logit_scale": 1.0, **_WINDOW, **_ONE_OF_EACH},
    "ernie4_5": {**_HEAD, "head_dim": 8},
    "exaone4": {**_COMMON, **_WINDOW, **_ONE_OF_EACH},
    "falcon": {**_COMMON, "new_decoder_architecture": False},
    "gemma": _HEAD,
    "gemma3_text": {**_HEAD, **_WINDOW, **_ONE_OF_EACH, "query_pre_attn_scalar": 12},
    "glm": {**_HEAD, "head_dim": 8},
    "glm4": {**_HEAD, "head_dim": 8},
    "gpt_neox": {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"},
    "granite": {**_COMMON, "embedding_multiplier": 12.0, "logits_scaling": 2.0, "residual_multiplier": 0.22},
    "hunyuan_v1_dense": {**_HEAD, "head_dim": 8},
    "ministral": {**_HEAD, **_WINDOW, **_ONE_OF_EACH},
    "ministral3": _HEAD,
    "nemotron": _COMMON,
    "olmo": _COMMON,
    "olmo2": _COMMON,
    "olmo3": {**_COMMON, **_WINDOW, **_ONE_OF_EACH},
    "phi": _COMMON,
    "seed_oss": _HEAD,
    "smollm3": {**_COMMON, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "stablelm": _COMMON,
    "starcoder2": {**_COMMON, **_WINDOW},
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_SCAN = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
MIXED: dict[str, dict[str, Any]] = {
    "bamba": {**_COMMON, **_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {
        **{**_COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        **{"mamba_n_groups": 1},
    },
    "falcon_mamba": {**_SCAN, "time_step_rank": 8},
    "gemma4_text": {
        **{**_COMMON, **_WINDOW, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
        **{"layer_types": ["sliding_attention", "full_attention"]},
    },
    "granitemoehybrid": {
        **{**_COMMON, **_MAMBA, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48},
        **{"layer_types": ["mamba", "attention"]},
    },
    "jamba": {
        **{**_COMMON, "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_offset": 1, "attn_layer_period": 2},
        **{"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    },
    "lfm2": {**_COMMON, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm3": {**_COMMON, "layer_types": ["conv", "full_attention"]},
    "mamba": {**_SCAN, "time_step_rank": 8},
    "mamba2": {**_SCAN, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {
        **{**_COMMON, "num_hidden_layers": 3, "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8},
        **{"ssm_state_size": 8, "n_groups": 2, "layers_block_type": ["mamba", "attention", "mlp"]},
    },
    "olmo_hybrid": {**_COMMON, **_LINEAR_ATTENTION, "linear_num_key_heads": 4},
    "qwen3_5_text": {**_COMMON, **_LINEAR_ATTENTION},
    "qwen3_next": {**_COMMON, **_LINEAR_ATTENTION, "num_experts": 0, "mlp_only_layers": [0, 1]},
    "recurrent_gemma": {
        **{**_COMMON, "num_hidden_layers": 3, "head_dim": 8, "lru_width": 32, "attention_window_size": 8},
        **{"block_types": ["recurrent", "recurrent", "attention"]},
    },
}
_SHARED = {"shared_expert_intermediate_size": 16}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_OWN_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_SHARED_KEYS = {
    **{"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2},
    **{"head_dim": 8, **_WINDOW},
}
CARRYING: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        **{**_COMMON, "num_key_value_heads": 1, "num_hidden_layers": 4, "head_dim": 16, "partial_rotary_factor": 0.5},
        **{"q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 16},
        **{"index_topk": 2, **_WINDOW, "hc_mult": 2, "hc_sinkhorn_iters": 3, "moe_intermediate_size": 16},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"]},
        "layer_types": [
            *("sliding_attention", "compressed_sparse_attention"),
            *("heavily_compressed_attention", "compressed_sparse_attention"),
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    },
    "gemma3n_text": {
        **{**_COMMON, **_OWN_INPUTS, **_SHARED_KEYS, "intermediate_size": [48] * 6, "altup_num_inputs": 3},
        **{"laurel_rank": 8, "activation_sparsity_pattern": [0.5] + [0.0] * 5},
    },
    "gemma4_text": {**_COMMON, **_OWN_INPUTS, **_SHARED_KEYS, "global_head_dim": 16},
    "glm_moe_dsa": {
        **{**_LATENT, **_ONE_GROUP, "num_hidden_layers": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
        **{"indexer_types": ["full", "shared"] * 2, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {**_COMMON, "head_dim": 8, **_WINDOW, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
    "deepseek_v32": {**_LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 8},
    "dots1": {
        **{**_COMMON, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"n_shared_experts": 1, "first_k_dense_replace": 1},
    },
    "ernie4_5_moe": {
        **{**_COMMON, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
        **{"moe_layer_start_index": 1},
    },
    "gemma4_text": {
        **{**MIXED["gemma4_text"], "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        **{"moe_intermediate_size": 16},
    },
    "glm_moe_dsa": CARRYING["glm_moe_dsa"],
    "glm4_moe": {**_LATENT, "head_dim": 8},
    "glm4_moe_lite": {**_LATENT, **_ONE_GROUP},
    "gpt_oss": {**_COMMON, **_WINDOW, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {**MIXED["granitemoehybrid"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {**_COMMON, "head_dim": 8, "num_experts": 4, "moe_topk": [2] * 2},
    "jamba": {**MIXED["jamba"], "num_experts": 4, "num_experts_per_tok": 2},
    "kimi_linear": {
        **{**_LATENT, **_ONE_GROUP, "num_experts": 4, "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_head_dim": 8, "linear_num_heads": 4},
    },
    "lfm2_moe": {**_COMMON, **_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {  # chunks of attention, no positions in the last layer, no experts in the first
        **{**_COMMON, "num_hidden_layers": 3, "head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 40},
        **{"no_rope_layers": [1, 1, 0], "attention_chunk_size": 8, "floor_scale": 8, "moe_layers": [1, 2]},
    },
    "longcat_flash": {  # two attentions and three MLPs in each layer, and experts that have no weights
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4},
        **{"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "q_lora_rank": 16, "kv_lora_rank": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4, "n_routed_experts": 4},
        **{"moe_topk": 2, "zero_expert_num": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1},
    },
    "minimax": {
        **{**_COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8},
        **{"layer_types": ["linear_attention", "full_attention"]},
    },
    "minimax_m2": {**_COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "nemotron_h": {
        **{**MIXED["nemotron_h"], "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "mlp", "moe"]},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"moe_shared_expert_intermediate_size": 16},
    },
    "olmoe": {**_COMMON, **_EXPERTS},
    "qwen2_moe": {**_COMMON, **_EXPERTS, **_SHARED},
    "qwen3_5_moe_text": {**_COMMON, **_EXPERTS, **_SHARED, **_LINEAR_ATTENTION},
    "qwen3_moe": {**_HEAD, **_EXPERTS, "num_experts": 6},
    "qwen3_next": {**_COMMON, **_EXPERTS, **_SHARED, **_LINEAR_ATTENTION},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": (
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        r"most weights of its layers are no weights of an nn\.Linear, such as attn\.c_attn\.weight \[32, 96\]",
    ),
}


def make_architecture(folder: Path, model_type: str, values: dict[str, Any], **saving: Any) -> str:
    """Save a tiny random model whose layers all matter; its persistent buffers are random, too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values))
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.data.copy_(noise * 0.3 if parameter.dim() > 1 else parameter + noise * 0.1)
    for buffer in persistent_buffers(model).values():
        if buffer.is_floating_point():
            noise = torch.randn(buffer.shape).to(buffer.dtype)
            buffer.copy_(buffer * (1 + noise / 4) if buffer.any() else noise)  # a causal mask stays one
        else:  # the experts of each token
            buffer.copy_(torch.rand(len(buffer), EXPERTS).argsort(-1)[:, : buffer.shape[1]])
    model.save_pretrained(folder, **saving)
    return str(folder)
