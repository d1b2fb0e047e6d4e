"""Experts whose inputs, not their outputs, are multiplied by the router's weights: those of Llama 4.

transformers hands every token to every expert, times zero where the router has not chosen it. Here the block calls its
experts as those of other families do, with the tokens, the experts that each is routed to, and the weights of these:
an expert sees the tokens that are routed to it, scaled as in transformers' own code, and zeros are not multiplied.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, EXPERTS = "Llama4TextMoe", "Llama4TextExperts"


def scales_inputs(mixture: nn.Module) -> bool:
    """Return whether the experts of a mixture see tokens that are multiplied by the router's weights."""
    return type(mixture).__name__ == EXPERTS


def route_tokens(model: nn.Module) -> None:
    """Have the blocks of a model hand experts the tokens that are routed to them alone."""
    own: dict[str, Callable[..., Any]] = {BLOCK: _block, EXPERTS: _experts}
    for module in model.modules():
        if forward := own.get(type(module).__name__):
            module.__dict__["forward"] = MethodType(forward, module)


def _block(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass of a block, [..., hidden]; returns [tokens, hidden] and the router's logits."""
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)  # zeros for experts that are not chosen
    weights, chosen = scores.topk(self.top_k, dim=-1)
    return self.shared_expert(hidden) + self.experts(hidden, chosen, weights), logits


def _experts(self: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The sum of what experts make of the tokens [tokens, hidden] that they are `chosen` for, [tokens, experts of a
    token], times their `weights` of the same shape."""
    total = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        place, token = torch.where((chosen == expert).t())
        scaled = hidden[token] * weights[token, place, None]
        gate, up = torch.matmul(scaled, self.gate_up_proj[expert]).chunk(2, dim=-1)
        total.index_add_(0, token, torch.matmul(up * self.act_fn(gate), self.down_proj[expert]))
    return total
