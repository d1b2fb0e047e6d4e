"""Variable-length attention: each example of packed rows by itself, without a mask of tokens by tokens.

A mask of rows of L tokens takes L^2 bytes a row, and attention computes all that it hides: for examples of l tokens,
L / l times what they need. Here the examples of a batch are told apart by their first tokens: a GPU takes all of them
in one kernel (FlashAttention, as torch has it), a CPU one after the other.
"""

import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

NAME = "shardprune_by_example"
BOUNDS = "cu_seq_lens_q"  # transformers' name of the first tokens of examples, and of what follows the last one
WIDEST, STEP = 256, 8  # of a head in the kernel, and what divides its width
OLDEST = (8, 0)  # compute capability that the kernel takes


def attend_by_example(model: PreTrainedModel, device: torch.device) -> bool:
    """Let a model attend by examples, if variable-length attention is there for it; return whether it is.

    A model that does so takes, beside tokens and positions, `BOUNDS`: see `bounds_of`. For others, transformers makes a
    mask of the positions.
    """
    if model.config._attn_implementation != "sdpa":  # one that caps scores
        return False
    if device.type == "cuda" and not _kernel_takes(model, device):
        return False
    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
    return True


def bounds_of(position_ids: Tensor) -> Tensor:
    """Return the places of the first tokens of all examples in the flattened rows, and the number of tokens.

    Args:
        position_ids: int64 [batch, longest], 0 at the first token of each example.

    Returns:
        int32 [examples + 1].
    """
    first = (position_ids.flatten() == 0).nonzero()[:, 0]
    return nn.functional.pad(first, (0, 1), value=position_ids.numel()).int()


def _kernel_takes(model: PreTrainedModel, device: torch.device) -> bool:
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        model.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= OLDEST
        and width <= WIDEST
        and not width % STEP
        and not getattr(config, "attention_dropout", 0)
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers has its layers do it.

    Args:
        query: [batch, heads, longest, width]; `key` and `value` may have fewer heads.
        attention_mask: None: there is no mask function of this name.
        sliding_window: the number of tokens, with its own, that a token sees; None: all before it.
        keywords: `BOUNDS`, and what is of no use here.

    Returns:
        [batch, longest, heads, width], and no weights.
    """
    assert attention_mask is None
    bounds: Tensor = keywords[BOUNDS]
    batch, _, longest, _ = query.shape
    # The tokens of all rows behind each other, [tokens, heads, width].
    queries, keys, values = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    if query.is_cuda:
        output = _in_one_kernel(queries, keys, values, bounds, longest, scaling, sliding_window)
    else:
        output = _one_by_one(queries, keys, values, bounds.tolist(), dropout, scaling, sliding_window)
    return output.unflatten(0, (batch, longest)), None


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: list[int],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return the attention of tokens [tokens, heads, width], one example after the other."""
    outputs = []
    for start, stop in pairwise(bounds):
        own_query, own_key, own_value = (one[start:stop].transpose(0, 1)[None] for one in (query, key, value))
        mask = None if window is None or stop - start <= window else _band(stop - start, window)
        output = scaled_dot_product_attention(
            own_query,
            own_key,
            own_value,
            mask,
            dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _band(tokens: int, window: int) -> Tensor:
    """Return which tokens [query, key] of an example see which: themselves, and those before them in a window."""
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().triu(1 - window)


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None
) -> Tensor:
    """Return the attention of tokens [tokens, heads, width] on a GPU, whose host does not wait for their bounds."""
    from torch.nn.attention.varlen import varlen_attn

    settings: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _takes_groups():
            settings["enable_gqa"] = True
        else:
            key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    output = varlen_attn(query, key, value, bounds, bounds, longest, longest, **settings)
    assert isinstance(output, Tensor)  # nothing beside it was asked for
    return output


@cache
def _takes_groups() -> bool:
    """Return whether the kernel of this torch takes fewer heads of keys than of queries."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
