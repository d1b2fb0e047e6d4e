"""Tiny random models of every supported family, made by transformers, and helpers around them."""

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

VOCABULARY = 64
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}

# Sliding windows are shorter than the sequences of the tests, so that layers differ in their masks.
CONFIGS = {
    "llama": ("LlamaConfig", {**_COMMON, "num_key_value_heads": 4}),
    "llama-grouped-tied": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": True}),
    "llama-3.1": ("LlamaConfig", {**_COMMON, "rope_parameters": _LLAMA3_ROPE}),
    "mistral": ("MistralConfig", {**_COMMON, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {**_COMMON, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**_COMMON, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", _COMMON),
    "opt": ("OPTConfig", _OPT),
    "opt-350m": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}

# The same with four key/value groups, of which some can go: the query heads of three do not divide the hidden size.
_FOUR_GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
GROUPED = {
    family: (class_name, values if class_name == "OPTConfig" else {**values, **_FOUR_GROUPS})
    for family, (class_name, values) in CONFIGS.items()
}
# How LLaVA checkpoints call the tensors of their language tower, and what makes `save_pretrained` do so.
LLAVA_LAYOUTS = {"language_model.model.": {}, "model.language_model.": {"save_original_format": False}}


def make_model(
    folder: Path,
    family: str = "llama-3.1",
    dtype: torch.dtype = torch.float32,
    configs: dict[str, tuple[str, dict]] = CONFIGS,
    seed: int = 0,
    **saving,
) -> str:
    """Save a tiny random model of a family; weights are large enough for every layer to matter."""
    class_name, values = configs[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**values))
    return _save_random(model, folder, dtype, **saving)


def make_llava(folder: Path, text: dict = GROUPED["llama"][1], vision: dict | None = None, **saving) -> str:
    """Save a tiny random LLaVA whose language tower is a Llama, by fields of the towers' configs."""
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"image_size": 8, "patch_size": 4, **(vision or {})}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=VOCABULARY - 1,
        image_seq_length=4,
    )
    return _save_random(transformers.LlavaForConditionalGeneration(config), folder, **saving)


def _save_random(
    model: transformers.PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **saving
) -> str:
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.to(dtype).save_pretrained(folder, **saving)
    return str(folder)


def make_tokens(path: Path, samples: int = 12, seqlen: int = 24, seed: int = 0) -> str:
    """Save random token windows."""
    np.save(path, np.random.default_rng(seed).integers(0, VOCABULARY, (samples, seqlen)))
    return str(path)


def load_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as the safetensors library reads them."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def differing(one: str | Path, other: str | Path) -> list[str]:
    """Names of the tensors that are not equal to the bit in two checkpoints."""
    first, second = load_tensors(one), load_tensors(other)
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype for name in first)
    bits = {1: torch.uint8}  # torch compares no FP8
    return [
        name
        for name in first
        if not torch.equal(*(one[name].view(bits.get(one[name].itemsize, one[name].dtype)) for one in (first, second)))
    ]


def snapshot(folder: str | Path) -> dict[str, bytes]:
    """The content of every file below a folder."""
    root = Path(folder)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
