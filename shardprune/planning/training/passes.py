"""The memory of a micro-batch's forward and backward pass, counted while it runs on the meta device.

The model is the one that is trained: with its low-rank updates, its head that computes the loss, and its recomputed
layers. On the meta device operations make tensors without memory, which live as long as those of a real run.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel, masking_utils

from shardprune.model.experts import Expert, mixtures
from shardprune.model.meta_device import META, on_meta
from shardprune.recovery.loss import Distillation
from shardprune.recovery.predictions import PredictionBatch

FEW = 16  # experts of a layer that are run at least, if it has as many


class Uncounted(Exception):
    """A model's code looks at values, and cannot run where there are none."""


@dataclass(frozen=True)
class Moment:
    """A moment of a pass: `activations`, bytes of the tensors that are alive then, and `gradients`, the number of
    elements of the parameters whose gradients are there."""

    activations: int
    gradients: int


@dataclass(frozen=True)
class Passes:
    """The memory of a forward and backward pass.

    Attributes:
        kept: bytes that are alive between the two.
        moments: of the most memory, for each number of gradients that are there.
    """

    kept: int
    moments: tuple[Moment, ...]

    def peak(self, bytes_per_gradient: float) -> float:
        """Return the most bytes of activations and gradients, where the latter stay until the step."""
        return max(one.activations + bytes_per_gradient * one.gradients for one in self.moments)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.gradients = 0
        self.highest: dict[int, int] = {}  # by number of gradients
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # an expert's matrix looks at products of the model's code alone
            result = on_meta(func, args, kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def exclude(self, tensors: Iterator[Tensor]) -> None:
        """Do not count these, which are there before."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage()._cdata)

    def gradient(self, parameter: Tensor) -> None:
        """Take a parameter's gradient out of what is counted: who keeps it, and for how long, depends on the stage."""
        self.gradients += parameter.numel()
        parameter.grad = None
        self._note()

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.bytes += size
        weakref.finalize(storage, self._free, key, size)
        self._note()

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.bytes -= size

    def _note(self) -> None:
        self.highest[self.gradients] = max(self.highest.get(self.gradients, 0), self.bytes)


class _FusedAttention(torch.autograd.Function):
    """Attention as fused kernels have it: scores are never in memory; kept are its arguments, its output, and a number
    for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Laid out as the kernels do: [batch, tokens, heads, width], which is transposed back without a copy.
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, tokens, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return tuple(torch.empty_like(tensor) for tensor in (query, key, value))


def _evenly(mixture: nn.Module, forward: Any, hidden: Tensor, experts: Tensor, *weights: Tensor) -> Tensor:
    """Run a mixture as if its router sent as many tokens to each of some experts: without values it chooses none.

    All experts together keep as much from the forward for the backward pass, however many there are.
    """
    count = len([part for part in mixture.children() if isinstance(part, Expert)])
    seeing = min(count, max(FEW, 2 * experts.shape[-1]))
    even = torch.arange(experts.numel()).remainder(seeing).reshape(experts.shape)
    return forward(hidden, even, *weights)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _FusedAttention.apply(query, key, value)


@contextmanager
def _as_on_a_device(model: nn.Module) -> Iterator[None]:
    """Let transformers' code run on meta tensors as on those of a device, whose values it may look at."""
    with (
        ExitStack() as routed,
        patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        patch.object(masking_utils, "find_packed_sequence_indices", lambda _: None),
    ):
        for mixture in mixtures(model).values():
            even = partial(_evenly, mixture, mixture.forward)
            routed.enter_context(patch.dict(mixture.__dict__, {"forward": even}))
        yield


def _held_before(model: nn.Module, seeing: PreTrainedModel | None, batch: PredictionBatch) -> Iterator[Tensor]:
    """Yield what is in memory before a pass."""
    for module in (model, seeing) if seeing is not None else (model,):
        yield from module.parameters()
        yield from module.buffers()
    yield from (*batch.inputs.values(), batch.places, batch.targets)


def count_passes(
    student: nn.Module,
    batch: PredictionBatch,
    distillation: Distillation | None,
    seeing: PreTrainedModel | None = None,
) -> Passes:
    """Count the memory of a training's forward and backward pass over a micro-batch.

    Args:
        student: with parameters on the meta device.
        seeing: the multimodal model around it, which is no module of it; None without one.
    """
    live = LiveBytes()
    live.exclude(_held_before(student, seeing, batch))
    hooks = [
        parameter.register_post_accumulate_grad_hook(live.gradient)
        for parameter in student.parameters()
        if parameter.requires_grad
    ]
    student.train()
    with _as_on_a_device(student), live:
        loss = student(batch, distillation)
        kept = live.bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Passes(kept, tuple(Moment(activations, number) for number, activations in live.highest.items()))


def count_forward(
    model: nn.Module,
    batch: PredictionBatch,
    finish: Callable[[Tensor], Any] | None = None,
    seeing: PreTrainedModel | None = None,
) -> int:
    """Return the most bytes that a forward pass without gradients takes, and what is done with its result; `seeing` as
    in `count_passes`."""
    live = LiveBytes()
    live.exclude(_held_before(model, seeing, batch))
    model.eval()
    with torch.no_grad(), _as_on_a_device(model), live:
        result = model(batch)
        finished = finish(result) if finish else None
    del result, finished
    return max(live.highest.values())


def meta_inputs(rows: int, length: int) -> dict[str, Tensor]:
    """Return the arguments of a model's forward pass on full rows, without values."""
    ids = torch.empty(rows, length, dtype=torch.int64, device=META)
    return {"input_ids": ids, "position_ids": ids.clone()}


def meta_batch(inputs: dict[str, Tensor], predictions: int) -> PredictionBatch:
    """Return a batch with so many predictions."""
    places = torch.empty(predictions, dtype=torch.int64, device=META)
    return PredictionBatch(inputs, places, places.clone())
