"""The check of a class of models that is met for the first time.

That a model may be run one layer at a time is an assumption: a layer may read what an earlier one has left behind, or
arguments may depend on the tokens. A model of the class, small and with random weights, shows whether it holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.causal_class import TEXT_PARTS
from shardprune.model.config_file import deferred_warnings, in_one_line
from shardprune.model.empty_model import empty_model, persistent_buffers
from shardprune.model.expert_removal import COUNTS, LEAST_OF_GROUP, PER_TOKEN
from shardprune.model.experts import named_tensors
from shardprune.model.kept_keys import KeptKeys
from shardprune.model.skeleton import Skeleton

# Classes whose tiny models pass the check, and a whole run beside transformers, in the tests. All layers of the first
# are attention with an MLP, and keep keys and values of earlier tokens alone; those of `ROUTING` have experts, those of
# `CARRYING` pass more than hidden states on; those of `TEXT_PARTS` run as parts of their multimodal models.
ATTENDING = frozenset(
    (
        *("apertus", "arcee", "bloom", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2"),
        *("gemma3_text", "glm", "glm4", "gpt_neox", "granite", "hunyuan_v1_dense", "llama", "ministral", "ministral3"),
        *("mistral", "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss"),
        *("smollm3", "stablelm", "starcoder2"),
    )
)
MIXING = frozenset(
    (
        *("bamba", "falcon_h1", "falcon_mamba", "gemma4_text", "granitemoehybrid", "jamba", "lfm2"),
        *("lfm3", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "recurrent_gemma"),
    )
)
ROUTING = frozenset(
    (
        *("cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe"),
        *(
            "glm4_moe_lite",
            "gpt_oss",
            "granitemoe",
            "hunyuan_v1_moe",
            "kimi_linear",
            "lfm2_moe",
            "llama4_text",
            "longcat_flash",
            "minimax",
            "minimax_m2",
            "mixtral",
            "olmoe",
        ),
        *("qwen2_moe", "qwen3_5_moe_text", "qwen3_moe"),
    )
)
CARRYING = frozenset(("deepseek_v4", "gemma3n_text", "gemma4_text", "glm_moe_dsa"))
# Of those, layers keep states beside keys and values, and the tests let them write text, too.
KEEPING_STATES = frozenset(
    (
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "lfm3", "mamba", "mamba2"),
        *("nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next"),
    )
)
CHECKED = ATTENDING | MIXING | ROUTING | CARRYING | TEXT_PARTS
SEQUENCES, SEQLEN = 2, 24
VOCABULARY = 256
ROUNDING = 1e-4  # of logits in float32, as a share of the largest
DENSE_BEFORE_EXPERTS = "first_k_dense_replace"  # number of the first layers, which have no experts
NUMBERED = ("moe_layers", "cross_attention_layers")  # numbers of the layers of a kind: with experts, or for images
FEW, NARROW = 2, 256  # experts, for each that a token gets; neurons of one of them
LARGEST = 2**28  # parameters of a model that is made for the check


def check_class(config: PretrainedConfig) -> None:
    """Check that models of a class compute layer by layer what they compute as a whole; one of `CHECKED` does.

    Raises:
        InputError: this one does not; says how it differs.
    """
    if config.model_type not in CHECKED:
        _check(_Content.of(config))


@dataclass(frozen=True)
class _Content:
    """A config that equals every other one of the same content."""

    text: str
    config: PretrainedConfig = field(compare=False)

    @classmethod
    def of(cls, config: PretrainedConfig) -> "_Content":
        return cls(config.to_json_string(use_diff=False), config)


@cache
def _check(content: _Content) -> None:
    """Check a class once in a process, by the content of its config."""
    try:
        difference = difference_layer_by_layer(small_config(content.config))
    except InputError:
        raise
    except Exception as error:  # the model's own code, in a way for which it is not made
        raise _refused(f"fails: {in_one_line(error)}") from error
    if difference:
        raise _refused(f"gives other logits than as a whole, by up to {difference:.2g}")


def _refused(reason: str) -> InputError:
    return InputError("model", f"cannot be pruned: a small model of its class, run layer by layer, {reason}")


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of a model of the same class and features, but few and narrow layers.

    Kept is one layer of each kind that the config's lists tell apart, and the last one; the width of a head; the number
    of query heads per key/value head. Where that is still large, few and narrow experts are kept.

    Raises:
        InputError: the class takes no such config.
    """
    layers = config.num_hidden_layers
    numbered = {name: numbers for name in NUMBERED if (numbers := getattr(config, name, None)) is not None}
    lists = {
        name: value for name, value in config.to_dict().items() if isinstance(value, list) and len(value) == layers
    }
    lists |= {name: [index in numbers for index in range(layers)] for name, numbers in numbered.items()}
    kinds = [repr([value[index] for value in lists.values()]) for index in range(layers)]
    kept = sorted({kinds.index(kind) for kind in kinds} | {0, layers - 1})
    values = config.to_dict() | {name: [value[index] for index in kept] for name, value in lists.items()}
    for name, numbers in numbered.items():
        values[name] = [place for place, index in enumerate(kept) if index in numbers]
    for name, value in values.items():
        if name.endswith("_token_id") and not (isinstance(value, int) and value < VOCABULARY):
            # Some classes want a first token (Llama 3.2 Vision); one for padding would blank a row of the embedding.
            values[name] = 0 if isinstance(value, int) and name == "bos_token_id" else None
    names = config.attribute_map

    def with_fields(fields: dict[str, int]) -> PretrainedConfig:
        changed = {names.get(name, name): value for name, value in fields.items() if hasattr(config, name)}
        with deferred_warnings():
            made = AutoConfig.for_model(**{**values, **changed, "model_type": config.model_type})
        size = sum(p.numel() for p in empty_model(made, torch.float32, torch.device("cpu")).parameters())
        if size > LARGEST:
            raise ValueError(f"it has {size} parameters")
        return made

    attentions = layers // (getattr(config, "num_layers", None) or layers) or 1  # of a layer, which the config counts
    few = {"num_hidden_layers": len(kept) * attentions, "vocab_size": min(config.vocab_size, VOCABULARY)}
    if getattr(config, DENSE_BEFORE_EXPERTS, 0):
        few[DENSE_BEFORE_EXPERTS] = 1
    for experts in (dict[str, int](), _few_experts(config)):
        try:
            return with_fields({**few, **_narrow(config), **experts})
        except Exception:  # a class that relates its sizes in a way of its own keeps them
            continue
    try:
        return with_fields(few)
    except Exception as error:
        raise _refused(f"cannot be made: {in_one_line(error)}") from error


def _narrow(config: PretrainedConfig) -> dict[str, int]:
    """Return narrower sizes of a config's layers."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    groups = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or hidden // heads
    kept = min(groups, 2)
    fields = {"num_attention_heads": heads // groups * kept, "num_key_value_heads": kept}
    fields["hidden_size"] = fields["num_attention_heads"] * dim
    if isinstance(width := getattr(config, "intermediate_size", None), int):
        fields["intermediate_size"] = min(width, 2 * fields["hidden_size"])
    return fields


def _few_experts(config: PretrainedConfig) -> dict[str, int]:
    """Return smaller numbers of experts and of their neurons, where a config says how many there are."""
    fields = {}
    groups = getattr(config, "n_group", None) or 1
    for name in (name for name in COUNTS if isinstance(getattr(config, name, None), int)):
        chosen = next((value for own in PER_TOKEN if isinstance(value := getattr(config, own, None), int)), 1)
        fields[name] = min(getattr(config, name), groups * max(LEAST_OF_GROUP, -(-FEW * chosen // groups)))
    if isinstance(width := getattr(config, "moe_intermediate_size", None), int):
        fields["moe_intermediate_size"] = min(width, NARROW)
    return fields


@dataclass(frozen=True)
class _Drawn:
    """Random tensors of a model by name."""

    tensors: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def check_unchanged(self, names: Iterable[str]) -> None:
        pass


@torch.no_grad()
def difference_layer_by_layer(config: PretrainedConfig) -> float:
    """Return the largest difference between the logits of a random model as a whole and layer by layer.

    Raises:
        InputError: the model has layers that are not pruned.
    """
    generator = torch.Generator().manual_seed(0)
    whole = empty_model(config, torch.float32, torch.device("cpu")).eval().requires_grad_(False)
    drawn = _draw(whole, generator)
    skeleton = Skeleton(config, "cpu", torch.float32)
    tokens = torch.randint(0, config.vocab_size, (SEQUENCES, SEQLEN), generator=generator)
    skeleton.load_frame(drawn, embedding=True, head=True)
    hidden = skeleton.embed(tokens)
    for index in range(skeleton.layers):
        tensors = ((name, drawn.read(name)) for name in skeleton.layer_tensors(index))
        layer = skeleton.build_layer(index, tensors)
        hidden = skeleton.forward_layer(layer, hidden, skeleton.layer_arguments(index, *tokens.shape))
    logits, expected = skeleton.logits(hidden), whole(input_ids=tokens, use_cache=False).logits
    if not bool(torch.isfinite(expected).all()):
        raise _refused("has logits that are not finite")
    if difference := float((logits - expected).abs().max()):
        return difference
    later = torch.cat([tokens[:, :-1], (tokens[:, -1:] + 1) % config.vocab_size], 1)
    moved = (whole(input_ids=later, use_cache=False).logits - expected)[:, :-1].abs().max()
    if not moved < ROUNDING * expected.abs().max():  # experts add up the tokens that they are sent together
        raise _refused("predicts tokens from those behind them: it is no causal language model")
    return 0.0


def check_class_writes(config: PretrainedConfig) -> None:
    """Check that models of a class compute token by token, with what is kept, what they compute for a text as a
    whole; one of `ATTENDING` or `KEEPING_STATES` does.

    Raises:
        InputError: this one does not; says by how much.
    """
    if config.model_type not in ATTENDING | KEEPING_STATES:
        _check_writes(_Content.of(config))


@cache
def _check_writes(content: _Content) -> None:
    """Check a class once in a process, by the content of its config."""
    try:
        small = small_config(content.config)
        alone, in_turn = difference_token_by_token(small), difference_token_by_token(small, in_turn=True)
    except Exception as error:  # the model's own code, in a way for which it is not made
        raise _no_writer(f"fails: {in_one_line(error)}") from error
    if not alone < ROUNDING:
        raise _no_writer(f"gives other logits than for a text as a whole, by up to {alone:.2g}")
    if not in_turn < ROUNDING:
        raise _no_writer("keeps what it has seen in its layers, where two texts that grow in turn share it")


def _no_writer(reason: str) -> InputError:
    problem = f"'self' is not possible: a small model of its class, run token by token, {reason}"
    return InputError("calibration", f"{problem}; give a text")


@torch.no_grad()
def difference_token_by_token(config: PretrainedConfig, in_turn: bool = False) -> float:
    """Return the largest difference between the logits of a random model for tokens as a whole, and one after the
    other, as a share of the largest logit.

    Args:
        in_turn: the sequences are batches of their own, each of which goes one token further in turn.
    """
    generator = torch.Generator().manual_seed(0)
    whole = empty_model(config, torch.float32, torch.device("cpu")).eval().requires_grad_(False)
    drawn = _draw(whole, generator)
    skeleton = Skeleton(config, "cpu", torch.float32)
    tokens = torch.randint(0, config.vocab_size, (SEQUENCES, SEQLEN), generator=generator)
    skeleton.load_frame(drawn, embedding=True, head=True)
    names = [skeleton.layer_tensors(index) for index in range(skeleton.layers)]
    layers = [
        skeleton.build_layer(index, ((name, drawn.read(name)) for name in own)) for index, own in enumerate(names)
    ]
    batches = tokens.split(1 if in_turn else SEQUENCES)
    kept = [KeptKeys(skeleton.layers, SEQLEN, skeleton.attentions) for _ in batches]
    logits = []
    for position in range(SEQLEN):
        latest = []
        for batch, seen in zip(batches, kept, strict=True):
            seen.seen = position
            hidden = skeleton.embed(batch[:, position : position + 1], seen)
            arguments = skeleton.next_arguments(len(batch), seen)
            for layer, own in zip(layers, arguments, strict=True):
                hidden = skeleton.forward_layer(layer, hidden, own)
            latest.append(skeleton.logits(hidden))
        logits.append(torch.cat(latest))
    expected = whole(input_ids=tokens, use_cache=False).logits
    return float((torch.cat(logits, 1) - expected).abs().max() / expected.abs().max())


def _draw(model: nn.Module, generator: torch.Generator) -> _Drawn:
    """Give a model random parameters and persistent buffers, which change all that they enter; return them."""
    places: dict[int, Tensor] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in places:
                noise = torch.randn(parameter.shape, generator=generator)
                places[id(parameter)] = noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + noise / 10
            module._parameters[leaf] = nn.Parameter(places[id(parameter)], requires_grad=False)
    for buffer in persistent_buffers(model).values():
        if buffer.is_floating_point():
            noise = torch.randn(buffer.shape, generator=generator).to(buffer.dtype)
            buffer.copy_(buffer * (1 + noise / 10) if buffer.any() else noise / 10)  # a causal mask stays one
    return _Drawn({name: tensor.detach().clone() for name, tensor in named_tensors(model).items()})
