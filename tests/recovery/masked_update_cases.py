"""The kernels of masked updates against a plain formulation in float64: the cases, and how they are compared.

As a program (`python -m tests.recovery.masked_update_cases`, TRITON_INTERPRET=1) it prints one JSON line a case:
whether kernels are interpreted is settled for a process when it defines them.
"""

import json
from typing import Any

import torch
from torch import Tensor

from shardprune.recovery import masked_update
from shardprune.recovery.lowrank import LowRankLinear

# Rows, columns, rank, dtype and dropout; tiles are 128 x 64, and blocks of rows and columns 192 here.
CASES: dict[str, tuple[int, int, int, torch.dtype, float]] = {
    "rank 8, narrower than a tile": (40, 24, 8, torch.float32, 0.0),
    "rank 16, sizes no multiples": (133, 201, 16, torch.float32, 0.0),
    "rank 64, dropout": (192, 128, 64, torch.float32, 0.3),
    "rank 70, more than are taken at a time": (130, 70, 70, torch.float32, 0.0),
    "16 bits, rank 8": (150, 210, 8, torch.float16, 0.0),
    "16 bits, rank 16, dropout": (128, 576, 16, torch.float16, 0.3),
    "16 bits, rank 64": (133, 65, 64, torch.float16, 0.0),
    "bfloat16, rank 16, dropout": (133, 201, 16, torch.bfloat16, 0.3),
    "bfloat16, rank 32": (150, 130, 32, torch.bfloat16, 0.0),
}
BLOCK, ALPHA, TOKENS = 192, 10.0, (2, 19)
Results = dict[str, Tensor]


def material(name: str, device: str) -> tuple[LowRankLinear, Tensor, Tensor]:
    """Return a module whose weight is half zeros, inputs [2, 19, cols] and the gradient of its outputs."""
    rows, cols, rank, dtype, dropout = CASES[name]
    torch.manual_seed(rows)
    linear = torch.nn.Linear(cols, rows, bias=False).requires_grad_(False)
    linear.weight[torch.rand(rows, cols) < 0.5] = 0
    linear.weight[0, :2] = torch.tensor([-0.0, 1e-7])  # a zero, and one that is none in half precision, too
    module = LowRankLinear(linear.to(device, dtype), rank, ALPHA, dropout, masked=True)
    module.reset(torch.Generator().manual_seed(0))
    module.lora_B.data.copy_(torch.randn(rows, rank) / rank**0.5)
    inputs, gradient = torch.randn(*TOKENS, cols), torch.randn(*TOKENS, rows)
    return module, inputs.to(device, dtype), gradient.to(device, dtype)


def computed(module: LowRankLinear, inputs: Tensor, gradient: Tensor, way: masked_update.Way) -> Results:
    """Return outputs and gradients of a module, its updates made in this way."""
    runs, block = masked_update.kernels_run, masked_update.BLOCK
    masked_update.kernels_run, masked_update.BLOCK = lambda _device: way == "kernel", BLOCK
    module.zero_grad()
    inputs = inputs.clone().requires_grad_()
    try:
        assert module.way == way
        torch.manual_seed(1)  # of dropout
        output = module(inputs)
        output.backward(gradient)
    finally:
        masked_update.kernels_run, masked_update.BLOCK = runs, block
    return {"outputs": output.detach(), **gradients(inputs, module.lora_A, module.lora_B)}


def exact(module: LowRankLinear, inputs: Tensor, gradient: Tensor) -> Results:
    """Return the same in float64, by autograd of the formula."""
    torch.manual_seed(1)
    kept = module.dropout(torch.ones_like(inputs)).double()
    weight, a, b = (tensor.detach().double() for tensor in (module.weight, module.lora_A, module.lora_B))
    a, b, x = a.requires_grad_(), b.requires_grad_(), inputs.double().requires_grad_()
    update = (weight != 0) * (module.scale * b @ a)
    output = x @ weight.T + (x * kept) @ update.T
    output.backward(gradient.double())
    return {"outputs": output.detach(), **gradients(x, a, b)}


def gradients(inputs: Tensor, a: Tensor, b: Tensor) -> Results:
    """Return the gradients that a backward pass has left."""
    found = {name: tensor.grad for name, tensor in (("inputs", inputs), ("A", a), ("B", b))}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def compared(name: str, device: str = "cpu") -> dict[str, Any]:
    """Return by result the relative distances of kernel and products from float64."""
    module, inputs, gradient = material(name, device)
    expected = exact(module, inputs, gradient)
    kernel, again, products = (computed(module, inputs, gradient, way) for way in ("kernel", "kernel", "products"))
    assert all(torch.equal(kernel[key], again[key]) for key in kernel)
    return {
        key: [float((found[key] - value).norm() / value.norm()) for found in (kernel, products)]
        for key, value in expected.items()
    }


def interpret_bfloat16() -> None:
    """Let the interpreter round to the nearest bfloat16 as GPUs do, and multiply bfloat16 as the numbers that they are.

    It cuts the bits that are too many, and multiplies the bits as integers.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self, value, to):
        if (value.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            nearest = torch.from_numpy(value.data).bfloat16().view(torch.uint16)
            return TensorHandle(nearest.numpy(), to.scalar)
        return cast(self, value, to)

    def widened(self, left, right, *rest):
        left, right = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (left, right))
        return dot(self, left, right, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounded, widened


if __name__ == "__main__":
    interpret_bfloat16()
    torch.set_num_threads(1)
    for name in CASES:
        print(json.dumps([name, compared(name)]), flush=True)
