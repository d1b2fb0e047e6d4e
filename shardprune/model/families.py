"""Model families: the modules of their decoder layers, and what no class of transformers says about them.

Which modules a layer has is taken from transformers' own classes (`shardprune.model.derivation`), so that a model needs
no row here to be pruned by its weights. A row of `FAMILIES` says which heads and neurons the rows and columns of the
weights belong to, so that they can be removed as a whole.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Literal

from shardprune.errors import InputError
from shardprune.model.carried import Carried

Unit = Literal["query", "key", "neuron"]  # the structure of a row or column: query head, key/value head, neuron


@dataclass(frozen=True)
class Structures:
    """The structures that the weights of a family's layers belong to.

    Attributes:
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

    rows: dict[str, tuple[Unit, ...]]
    columns: dict[str, Unit]
    neurons: str = "intermediate_size"
    fixed_heads: bool = False
    adds_outputs: bool | str = True
    packing: Literal["positions", "mask"] | None = None


NO_STRUCTURES = Structures(rows={}, columns={})
HIDDEN_STATES = Carried(0)


# The blocks of modules beside attention and MLP, whose outputs are added to the residual stream, too (Gemma 3n, 4 E).
BESIDE = {"laurel": "laurel", "per_layer_input_gate": "per_layer", "per_layer_projection": "per_layer"}
LATER = {"mlp": 1, "per_layer": 2}  # blocks behind all others, by their order


@dataclass(frozen=True)
class LayerKind:
    """The modules of the decoder layers of one kind, as their class runs them.

    Attributes:
        maps: tuples of linear maps that read the same input, in the order of the forward pass; pruned or not.
        inputs: those of them that are pruned, the projections.
        attention: maps of the attention; all others are the MLP's.
        mixtures: paths of mixtures of experts, whose parts are projections (`mlp.experts.3.gate_proj`), with the number
            of experts that each token passes through.
        idle: experts without weights that the routers of each mixture choose among, too.
        structures: of the weights, where they are known.
        returned: length of the tuple that a layer returns, of which its hidden states are the first; 0 where it returns
            them alone.
        kept: parameters with two or more dimensions that are no projections, by the reason why they stay as they are.
        runs: whether the model runs the layers for text. Others pass on what they get, and stay as they are: they have
            no maps, and so no projections.
    """

    maps: tuple[tuple[str, ...], ...]
    inputs: tuple[tuple[str, ...], ...]
    attention: frozenset[str]
    mixtures: dict[str, int] = field(default_factory=dict)
    idle: int = 0
    structures: Structures = NO_STRUCTURES
    returned: int = 0
    kept: dict[str, tuple[str, ...]] = field(default_factory=dict)
    runs: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections of a layer, in the order of the forward pass."""
        return tuple(name for group in self.inputs for name in group)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs of a layer in the order of the forward pass, each named by the first projection that reads it."""
        return tuple(names[0] for names in self.inputs)

    def mixture_of(self, projection: str) -> str | None:
        """Return the path of the mixture whose expert a projection belongs to; None where it sees all tokens."""
        return next((path for path in self.mixtures if projection.startswith(f"{path}.")), None)

    @cached_property
    def experts(self) -> dict[str, int]:
        """The number of experts of each mixture."""
        found: dict[str, set[int]] = {path: set() for path in self.mixtures}
        for name in (name for names in self.maps for name in names):
            if path := self.mixture_of(name):
                found[path].add(_expert(name, path))
        return {path: len(numbers) for path, numbers in found.items()}

    def share_of_tokens(self, name: str) -> float:
        """Return the share of all tokens that a linear map sees, where routers treat experts alike."""
        path = self.mixture_of(name)
        return 1.0 if path is None else self.mixtures[path] / (self.experts[path] + self.idle)

    def chunks(self, count: int) -> tuple[tuple[int, ...], ...]:
        """Return the places of the inputs of a layer in at most `count` chunks, which may be solved one after the
        other: each has a part of the experts, and the last one all else.

        What an expert sees does not depend on the weights of another, but on those of the attention before it.
        """
        chunks: list[list[int]] = [[] for _ in range(count)]
        for place, expert in enumerate(self._experts_of_inputs):
            chunks[count - 1 if expert is None else expert[0] * count // expert[1]].append(place)
        return tuple(tuple(places) for places in chunks if places) or ((),)

    @cached_property
    def _experts_of_inputs(self) -> tuple[tuple[int, int] | None, ...]:
        """The number of the expert that reads each input, and of the experts of its mixture; None: no expert does."""
        firsts = [(name, self.mixture_of(name)) for name in self.input_names]
        return tuple(None if path is None else (_expert(name, path), self.experts[path]) for name, path in firsts)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output projections of a layer, those whose outputs the residual stream gets, in the order of the forward
        pass."""
        return tuple(name for name in self.projections if name in self.structures.columns)

    @property
    def output_maps(self) -> tuple[str, ...]:
        """The linear maps whose outputs the residual stream gets, pruned or not, likewise."""
        return tuple(name for names in self.maps for name in names if name in self.structures.columns)

    @property
    def blocks(self) -> dict[str, tuple[str, ...]]:
        """The projections of attention and MLP, in the order of the forward pass. Where several mixers are attention
        side by side, each is a block under its own name; so is what a layer has beside both, and each of the attentions
        and MLPs of a layer that has a list of them."""
        blocks: dict[str, list[str]] = {}
        for name in self.projections:
            blocks.setdefault(self._block_of(name), []).append(name)
        return {block: tuple(blocks[block]) for block in sorted(blocks, key=lambda block: LATER.get(block, 0))}

    def end_of(self, block: str) -> str:
        """Return the module that gives the output of a block: its last linear map, whether it is pruned or not; where
        experts share the work, the module that holds them, and what they share."""
        maps = [name for names in self.maps for name in names if self._block_of(name) == block]
        if not any(map(self.mixture_of, maps)):
            return maps[-1]
        paths = [name.split(".") for name in maps if name.split(".")[0] == maps[-1].split(".")[0]]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join(parts[0] for parts in shared)

    def _block_of(self, name: str) -> str:
        """Return the block of a linear map."""
        place = self._part_of(name)
        if name not in self.attention:
            return place if "." in place else BESIDE.get(place, "mlp")
        return "attention" if len({self._part_of(one) for one in self.attention}) == 1 else place

    def _part_of(self, name: str) -> str:
        """Return the part of a layer that a linear map is in, with its number where it is one of a list."""
        first, second, *_ = (*name.split("."), "")
        return f"{first}.{second}" if second.isdigit() and self.mixture_of(name) is None else first


def _expert(name: str, mixture: str) -> int:
    """Return the number of the expert of a mixture that a linear map belongs to."""
    return int(name.removeprefix(f"{mixture}.").partition(".")[0])


@dataclass(frozen=True)
class Family:
    """The decoder layers of a model.

    Attributes:
        layers: path of their list in the causal language model.
        kinds: the kind of each layer.
        structures: of the weights, where they are known.
        carried: what passes from layer to layer.
    """

    layers: str
    kinds: tuple[LayerKind, ...]
    structures: Structures = NO_STRUCTURES
    carried: Carried = HIDDEN_STATES


LLAMA = Structures(
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
PHI3 = Structures(
    rows={"self_attn.qkv_proj": ("query", "key", "key"), "mlp.gate_up_proj": ("neuron", "neuron")},
    columns={"self_attn.o_proj": "query", "mlp.down_proj": "neuron"},
    packing="positions",
)
OPT = Structures(
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

FAMILIES: dict[str, Structures] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": replace(LLAMA, adds_outputs=False),
    "phi3": PHI3,
    "opt": OPT,
}

# Multimodal models whose language tower is a causal language model of its own, with the same logits for text alone.
TOWERS = frozenset(
    (
        *("gemma3", "gemma3n", "gemma4", "internvl", "llama4", "llava", "mistral3", "mllama", "qwen2_vl"),
        *("qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
    )
)
# Each layout that their checkpoints have maps the prefixes of the tower's stored tensors to those of that model.
TOWER_LAYOUTS: tuple[dict[str, str], ...] = (
    {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
    {"model.language_model.": "model.", "lm_head.": "lm_head."},
    {f"model.{name}.": f"model.{name}." for name in ("embed_tokens", "layers", "norm")} | {"lm_head.": "lm_head."},
)


def structures_of(model_type: str, field: str) -> Structures:
    """Return the structures of the models of a config's `model_type`.

    Args:
        field: the recipe's field that asks for them, for the error.

    Raises:
        InputError: they are not known; the error lists the families of which they are.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        reason = f"the heads, neurons and outputs of model_type {model_type!r} are not known"
        raise InputError(field, f"{reason}, only those of {known}; prune its weights alone")
    return FAMILIES[model_type]
