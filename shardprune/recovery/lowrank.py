"""Low-rank updates (LoRA, arXiv 2106.09685) of projections, optionally masked by the weight's zeros.

A masked update is W + mask * (scale * B A) with mask = (W != 0), in training as in the merged model. One module owns
all its tensors, because ZeRO-3 gathers the parameters of a module: weight, A and B are whole while it runs.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from shardprune.model.experts import Part
from shardprune.recovery.masked_update import MaskedUpdate, Way, way_of

UPDATES = ("lora_A", "lora_B")


class LowRankLinear(nn.Module):
    """A frozen linear map [rows, cols] with an update of rank r, as a replacement for an `nn.Linear`.

    It keeps the linear map's parameter names and adds `lora_A` [r, cols] and `lora_B` [rows, r].
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float, masked: bool) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        rows, cols = linear.out_features, linear.in_features
        dtype, device = linear.weight.dtype, linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, cols, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=device))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.masked = masked

    @property
    def way(self) -> Way | None:
        """How a masked update is made, see `way_of`; None without a mask."""
        return way_of(self.weight) if self.masked else None

    def reset(self, generator: torch.Generator) -> None:
        """Initialise as LoRA does: B is zero, A uniform like a linear layer's weight."""
        if self.lora_A.is_meta:  # nothing is trained, but counted
            return
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        self.lora_A.data.copy_(drawn)

    def forward(self, inputs: Tensor) -> Tensor:
        factors = self.lora_A, self.lora_B, self.scale
        drops = self.training and self.dropout.p > 0
        if self.masked and not drops:  # weight and update in one product
            output = MaskedUpdate.apply(inputs, self.weight, *factors, True)
            return output if self.bias is None else output + self.bias
        output = nn.functional.linear(inputs, self.weight, self.bias)
        return output + self.update_of(self.dropout(inputs))

    def update_of(self, inputs: Tensor) -> Tensor:
        """Return the product of inputs [..., cols] with the update alone."""
        if self.masked:
            return MaskedUpdate.apply(inputs, self.weight, self.lora_A, self.lora_B, self.scale, False)
        return nn.functional.linear(nn.functional.linear(inputs, self.lora_A), self.lora_B) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """Return the equivalent weight [rows, cols] in float32; A and B must be whole.

        Args:
            weight: the checkpoint's; the module's own may be rounded to the training precision.
        """
        weight = weight.to(self.lora_A.device, torch.float32)
        update = self.scale * self.lora_B.detach().float() @ self.lora_A.detach().float()
        return weight + (update * (weight != 0) if self.masked else update)


class LowRankPart(LowRankLinear):
    """A frozen part of an expert with an update, as a replacement for a `Part`."""

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:  # type: ignore[override]
        """Return the outputs [count, rows] with the update, of those that the expert's code has computed."""
        return output + self.update_of(self.dropout(inputs))


def add_updates(
    model: nn.Module, targets: Iterable[str], rank: int, alpha: float, dropout: float, masked: bool, seed: int
) -> Iterator[LowRankLinear]:
    """Replace every target by a `LowRankLinear` and yield it; initialisation depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for path in targets:
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        kind = LowRankPart if isinstance(linear, Part) else LowRankLinear
        module = kind(linear, rank, alpha, dropout, masked)
        module.reset(generator)
        setattr(model.get_submodule(parent), name, module)
        yield module
