"""The model families and what differs between them. A new family is one line in the table.

Everything else about a model is transformers' own code: see `shardprune.model.skeleton`.
"""

from dataclasses import dataclass
from typing import Literal

from shardprune.errors import InputError

Unit = Literal["query", "key", "neuron"]  # what a row or column belongs to: a query head, a key/value head, a neuron


@dataclass(frozen=True)
class Family:
    """Where a family keeps its decoder layers, and which projections of a layer read the same input.

    `layers` is the path of the list of layers in the causal language model; each tuple of `inputs`
    names the projections that share one input, in the order of the forward pass.
    `rows` says whose rows a projection has, part after part where it is fused; `columns` whose columns the
    output projections of attention and MLP have. `fixed_heads`: the family's code takes the number of heads
    and their width for one number, so that no head can go. `neurons` is the config's name for their number.
    """

    layers: str
    inputs: tuple[tuple[str, ...], ...]
    rows: dict[str, tuple[Unit, ...]]
    columns: dict[str, Unit]
    neurons: str = "intermediate_size"
    fixed_heads: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections of a layer, in the order of the forward pass."""
        return tuple(name for group in self.inputs for name in group)

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """The projections of the attention and of the MLP, in the order of the forward pass."""
        attention = tuple(name for name in self.projections if name.startswith("self_attn."))
        return {"attention": attention, "mlp": tuple(name for name in self.projections if name not in attention)}


LLAMA = Family(
    layers="model.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    rows={
        "self_attn.q_proj": ("query",),
        "self_attn.k_proj": ("key",),
        "self_attn.v_proj": ("key",),
        "mlp.gate_proj": ("neuron",),
        "mlp.up_proj": ("neuron",),
    },
    columns={"self_attn.o_proj": "query", "mlp.down_proj": "neuron"},
)
PHI3 = Family(
    layers="model.layers",
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    rows={"self_attn.qkv_proj": ("query", "key", "key"), "mlp.gate_up_proj": ("neuron", "neuron")},
    columns={"self_attn.o_proj": "query", "mlp.down_proj": "neuron"},
)
OPT = Family(
    layers="model.decoder.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
    rows={
        "self_attn.q_proj": ("query",),
        "self_attn.k_proj": ("key",),
        "self_attn.v_proj": ("key",),
        "fc1": ("neuron",),
    },
    columns={"self_attn.out_proj": "query", "fc2": "neuron"},
    neurons="ffn_dim",
    fixed_heads=True,
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "phi3": PHI3,
    "opt": OPT,
}

# Models with a language tower of one of these families, and what its tensors are called in a checkpoint: in each
# layout, the stored prefixes and those of a causal language model that stand for them.
TOWERS: dict[str, tuple[dict[str, str], ...]] = {
    "llava": (
        {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
        {"model.language_model.": "model."},
    ),
}


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`.

    Raises:
        InputError: it is not supported; the error lists those that are.
    """
    if model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, *TOWERS))
        raise InputError("model", f"model_type {model_type!r} is not supported; use one of {known}")
    return FAMILIES[model_type]
