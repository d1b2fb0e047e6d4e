"""What a layer's experts do while a wave passes through: sums over the tokens that are routed to each of them.

Routing indices and weights are those that the experts' module gets, so that every router's own code decides what counts
(softmax or sigmoid, groups, correction, scaling). Outputs are those that the class's code computes, of routed tokens
alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardprune.model.experts import DOWN, Expert, Part
from shardprune.model.scaled_experts import scales_inputs
from shardprune.shard.all_tokens import all_to
from shardprune.solvers.expert_scores import ExpertStatistics

SUMS = ("tokens", "weights", "norms", "products", "squares")  # rows of a tally; the last row has the maxima


class ExpertTally:
    """The sums of one wave over a layer's experts, float64 [6, experts]: `SUMS`, then maxima.

    Args:
        everywhere: sum up what every expert gives for every token, too.

    Attributes:
        outputs: those sums, float64 [experts, hidden] on the CPU.
        entered: the tokens that have entered the mixture.
    """

    def __init__(self, mixture: nn.Module, everywhere: bool = False) -> None:
        self._mixture, self._everywhere = mixture, everywhere
        self._scaled = scales_inputs(mixture)
        self._experts = {int(name): one for name, one in mixture.named_children() if isinstance(one, Expert)}
        self._routing: tuple[Tensor, Tensor] | None = None
        self._found: list[tuple[int, Tensor]] = []  # of each expert that got tokens, its column
        self.outputs: Tensor | None = None
        self.entered = 0

    @property
    def sums(self) -> Tensor:
        """The sums so far, float64 [6, experts] on the CPU."""
        sums = torch.zeros(len(SUMS) + 1, len(self._experts), dtype=torch.float64)
        if self._found:
            columns = torch.stack([column for _, column in self._found], dim=1).cpu()
            for place, (expert, _) in enumerate(self._found):
                sums[:-1, expert] += columns[:-1, place]
                sums[-1, expert] = torch.maximum(sums[-1, expert], columns[-1, place])
        return sums

    @contextmanager
    def watching(self) -> Iterator["ExpertTally"]:
        """Add up what passes through the experts while the block lasts."""
        hooks = [self._mixture.register_forward_pre_hook(self._routed, with_kwargs=True)]
        for number, expert in self._experts.items():
            part = expert.get_submodule(DOWN)
            assert isinstance(part, Part)
            hooks.append(
                part.register_forward_hook(lambda _module, _inputs, output, number=number: self._add(number, output))
            )
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _routed(self, _module: nn.Module, positional: Sequence[Any], keywords: dict[str, Any]) -> None:
        """Note which experts the tokens go to, [tokens, chosen], and the weights of their outputs."""
        _, *routing = (*positional, *keywords.values())
        (index,) = (one for one in routing if not one.is_floating_point())
        (weight,) = (one for one in routing if one.is_floating_point())
        if self._everywhere:
            self._add_everywhere(positional, keywords, len(index))
        self._routing = index, weight

    def _add_everywhere(self, positional: Sequence[Any], keywords: dict[str, Any], tokens: int) -> None:
        """Add the outputs of every expert for all tokens, each computed by the class's code as if all went to it."""
        hidden, *routing = positional
        everything = []
        for expert in range(len(self._experts)):
            chosen = {name: all_to(expert, one) for name, one in keywords.items()}
            output = self._mixture.forward(hidden, *(all_to(expert, one) for one in routing), **chosen)
            everything.append(output.flatten(0, -2).sum(0, dtype=torch.float64))
        outputs = torch.stack(everything).cpu()
        self.outputs = outputs if self.outputs is None else self.outputs + outputs
        self.entered += tokens

    def _add(self, expert: int, output: Tensor) -> None:
        """Add the outputs [count, hidden] of one expert, before their weights, in the order of its tokens. Where the
        weights are in its inputs, they are in its outputs already."""
        if self._routing is None:  # every expert is computed for every token
            return
        index, weights = self._routing
        place, token = torch.where((index == expert).t())  # the order in which every class goes through its tokens
        assert len(token) == len(output), "an expert got other tokens than are routed to it"
        if (bias := self._mixture._parameters.get(f"{DOWN}_bias")) is not None:
            output = output + bias[expert]
        weight, wide = weights[token, place].double(), output.float()
        norm = torch.linalg.vector_norm(wide, dim=-1).double()
        product = norm if self._scaled else weight * norm
        largest = wide.abs().max().double() if wide.numel() else norm.new_zeros(())
        count = norm.new_tensor(len(token))
        self._found.append(
            (
                expert,
                torch.stack([count, weight.sum(), norm.sum(), product.sum(), norm.square().sum(), largest]),
            )
        )


def statistics_of(tallies: Sequence[Tensor]) -> ExpertStatistics:
    """Return the statistics of a layer's experts from the tallies [6, experts] of all waves in their order."""
    sums = torch.stack(list(tallies))
    tokens, weights, norms, products, squares = (tuple(row.tolist()) for row in _in_order(sums[:, :-1]))
    counts, maxima = tuple(map(round, tokens)), tuple(sums[:, -1].amax(0).tolist())
    return ExpertStatistics(counts, weights, norms, products, squares, maxima)


def _in_order(parts: Tensor) -> Tensor:
    """Return the sum over the first dimension, one after the other."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total
