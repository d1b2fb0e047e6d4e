"""The model families and what differs between them. A new family is one line in the table.

Everything else about a model is transformers' own code: see `shardprune.skeleton`.
"""

from dataclasses import dataclass

from shardprune.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its decoder layers, and which projections of a layer read the same input.

    `layers` is the path of the list of layers in the causal language model; each tuple of `inputs`
    names the projections that share one input, in the order of the forward pass.
    """

    layers: str
    inputs: tuple[tuple[str, ...], ...]

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
)
PHI3 = Family(
    layers="model.layers",
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
)
OPT = Family(
    layers="model.decoder.layers",
    inputs=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.out_proj",),
        ("fc1",),
        ("fc2",),
    ),
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


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type`.

    Raises:
        InputError: it is not supported; the error lists those that are.
    """
    if model_type not in FAMILIES:
        raise InputError("model", f"model_type {model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
