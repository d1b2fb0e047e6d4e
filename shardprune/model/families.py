"""Model families and the table of their differences; a new family is one line in it.

Everything else about a model is transformers' own code: see `shardprune.model.skeleton`.
"""

from dataclasses import dataclass, replace
from typing import Literal

from shardprune.errors import InputError

Unit = Literal["query", "key", "neuron"]  # the structure of a row or column: query head, key/value head, neuron


@dataclass(frozen=True)
class Family:
    """The names of a family's modules and the structures that their weights belong to.

    Attributes:
        layers: path of the list of decoder layers in the causal language model.
        inputs: tuples of projections that read the same input, in the order of the forward pass.
        rows: the structure that a projection's rows belong to; one entry for each part of a fused projection.
        columns: the structure that the columns of an output projection (attention, MLP) belong to.
        neurons: the config's name for the number of neurons of an MLP.
        fixed_heads: the family's code derives the width of a head from their number, so that no head can be removed.
        adds_outputs: whether an output projection's output is added to the residual stream as it is, not normed on the
            way or with it; or the name of the config's switch that says so.
        packing: how packed examples are kept apart: `positions` restart at 0 with each example and transformers
            builds the mask, or an explicit attention `mask` is passed. One mask serves every layer, so that families
            with sliding windows need `positions`. None: packing is refused.
    """

    layers: str
    inputs: tuple[tuple[str, ...], ...]
    rows: dict[str, tuple[Unit, ...]]
    columns: dict[str, Unit]
    neurons: str = "intermediate_size"
    fixed_heads: bool = False
    adds_outputs: bool | str = True
    packing: Literal["positions", "mask"] | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections of a layer, in the order of the forward pass."""
        return tuple(name for group in self.inputs for name in group)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of a layer in the order of the forward pass, each named by the first projection that reads it."""
        return tuple(names[0] for names in self.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output projections of a layer, those whose outputs the residual stream gets, in the order of the forward
        pass."""
        return tuple(name for name in self.projections if name in self.columns)

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """The projections of attention and MLP, in the order of the forward pass."""
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
    packing="positions",
)
PHI3 = Family(
    layers="model.layers",
    inputs=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
    rows={"self_attn.qkv_proj": ("query", "key", "key"), "mlp.gate_up_proj": ("neuron", "neuron")},
    columns={"self_attn.o_proj": "query", "mlp.down_proj": "neuron"},
    packing="positions",
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
    adds_outputs="do_layer_norm_before",
    packing="mask",
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": replace(LLAMA, adds_outputs=False),
    "phi3": PHI3,
    "opt": OPT,
}

# Multimodal models with a language tower of one of these families. Each layout that their checkpoints have maps the
# prefixes of the tower's stored tensors to those of a causal language model.
TOWERS: dict[str, tuple[dict[str, str], ...]] = {
    "llava": (
        {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
        {"model.language_model.": "model."},
    ),
}


def family_of(model_type: str, field: str = "model") -> Family:
    """Return the family of a config's `model_type`.

    Args:
        field: the recipe's field that names the checkpoint, for the error.

    Raises:
        InputError: it is not supported; the error lists the supported ones.
    """
    if model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, *TOWERS))
        raise InputError(field, f"model_type {model_type!r} is not supported; use one of {known}")
    return FAMILIES[model_type]
