"""2:4 weights for torch's sparse kernels: which of a checkpoint can be compressed, and linear layers that compute with
them."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from shardprune.errors import InputError
from shardprune.model.checkpoint import Checkpoint
from shardprune.model.skeleton import Skeleton
from shardprune.solvers.pattern import NM

M = TypeVar("M", bound=nn.Module)

TWO_FOUR = NM(2, 4)
ROWS, COLS = 32, 64  # a weight's sizes are multiples of these, for every kernel of torch and 16 bits
CAPABILITY = (8, 0)  # of the first devices with kernels for 2:4


class RowsLinear(nn.Linear):
    """Linear layer that multiplies a matrix of all tokens at once.

    torch's own takes a batch apart where its strides don't fold, as those of what a sparse product returns do not, and
    compressed weights have no such product.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows = nn.functional.linear(input.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.reshape(*input.shape[:-1], self.out_features)


def fits(weight: Tensor) -> bool:
    """Return whether a weight [rows, cols] is 2:4 in sizes that torch's kernels take."""
    rows, cols = weight.shape
    return rows % ROWS == 0 and cols % COLS == 0 and TWO_FOUR.holds(weight)


def compressible(checkpoint: Checkpoint) -> list[str]:
    """Return the names in the files of the projections that torch's kernels can compute with; reads all of them.

    Raises:
        InputError: there are none.
    """
    skeleton = Skeleton(checkpoint.config, "cpu")
    named = (
        skeleton.projection_tensor(index, name)
        for index in range(skeleton.layers)
        for name in skeleton.projection_shapes(index)
    )
    found = [
        checkpoint.stored_name(name)
        for name in dict.fromkeys(named)
        if checkpoint.place(name).slice is None and fits(checkpoint.read(name))
    ]
    if not found:
        reason = f"has no 2:4 projection whose sizes are multiples of {ROWS} and {COLS}; use sparse"
        raise InputError("format", f"'semi-structured': {checkpoint.folder.url} {reason}")
    return found


def to_semi_structured(model: M) -> M:
    """Compress the 2:4 weights of a model's linear layers for torch's kernels, in place; return the model.

    Such a weight takes 9/16 of the memory of a dense one in 16 bits, and no gradient. All others stay as they are.

    Raises:
        InputError: the model lies on no CUDA device of compute capability 8.0 or above, or has no such weight.
    """
    check_device(next(model.parameters()).device)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and fits(module.weight)]
    if not linear:
        reason = f"has no 2:4 weight whose sizes are multiples of {ROWS} and {COLS}"
        raise InputError("model", f"{type(model).__name__} {reason}")
    for module in linear:
        packed = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
        module.weight = nn.Parameter(packed, requires_grad=False)
        if type(module) is nn.Linear:
            module.__class__ = RowsLinear
    return model


def check_device(device: torch.device) -> None:
    """Check that a device has kernels for 2:4.

    Raises:
        InputError: it has not.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        needed = ".".join(map(str, CAPABILITY))
        reason = f"has no kernels for 2:4; use a CUDA device of compute capability {needed} or above, or dense weights"
        raise InputError("device", f"{str(device)!r} {reason}")
