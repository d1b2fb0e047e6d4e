"""The logits that a model makes of its head's outputs: a scale and a cap, by the model's own code."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from shardprune.errors import InputError
from shardprune.model.skeleton import Skeleton

# Outputs of a head that are tried: the first is so small that no cap shows, of the last nothing but a cap is left.
TRIED = torch.tensor([1e-6, 1e-3, -0.1, 1.0, -3.0, 7.0, 40.0, 1e9], dtype=torch.float64)
ROUNDING = 1e-5  # relative: some models compute their logits in float32


@dataclass(frozen=True)
class HeadLogits:
    """Logits c tanh(s z / c) of a head's outputs z, or s z without a cap: `scale` s, as Granite, Cohere and Falcon-H1
    have one, and `cap` c (Gemma 2, arXiv 2408.00118)."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, outputs: Tensor) -> Tensor:
        """Return the logits of outputs; in float32 where they are others."""
        scaled = outputs if self.scale == 1.0 else outputs.float() * self.scale
        return scaled if self.cap is None else (scaled.float() / self.cap).tanh_().mul_(self.cap)

    def to_outputs(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Change a loss's gradient for logits, in place, to that for the outputs that they are made of."""
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap).square_()
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def head_logits(config: PretrainedConfig, field: str = "model") -> HeadLogits:
    """Return what a model makes of its head's outputs: its own code is given outputs of a small head. No weights are
    needed.

    Raises:
        InputError: it is more than a scale and a cap; names `field`.
    """
    # Of a copy: a model that is made from a config decides in it how to attend.
    skeleton = Skeleton(copy.deepcopy(config), "cpu", torch.float64)
    model, generator = skeleton.model, torch.Generator().manual_seed(0)
    head = model.get_output_embeddings()
    small = nn.Linear(head.in_features, len(TRIED), bias=False, dtype=torch.float64).requires_grad_(False)
    model.set_output_embeddings(small)
    skeleton.load_frame(_Drawn(model, generator))
    wave = torch.randn(1, 1, skeleton.wave_columns(1), dtype=torch.float64, generator=generator)
    state = skeleton.last_hidden_states(wave)[0, 0]
    small.weight.copy_(torch.outer(TRIED, state / state.dot(state)))
    found = skeleton.logits(wave)[0, 0].double()
    scale, most = float(found[0] / TRIED[0]), float(found[-1])
    made = HeadLogits(
        1.0 if abs(scale - 1) < ROUNDING else scale, most if most < scale * float(TRIED[-1]) / 2 else None
    )
    expected = TRIED * scale if made.cap is None else (TRIED * scale / made.cap).tanh() * made.cap
    if not torch.allclose(found, expected, rtol=ROUNDING, atol=0.0):
        kind = f"model_type {config.model_type!r}"
        raise InputError(field, f"is not trained: {kind} makes more of its head's outputs than a scale and a cap")
    return made


class _Drawn:
    """Random tensors of a model's small parts."""

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        self._shapes = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self._generator = generator

    def read(self, name: str) -> Tensor:
        return 1 + torch.rand(self._shapes[name], generator=self._generator)

    def check_unchanged(self, names: Iterable[str]) -> None:
        pass
