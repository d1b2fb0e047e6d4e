"""Masked low-rank updates of a fine-tuning: the kernels against float64, and their seconds beside torch's products."""

from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune.recovery import masked_update
from shardprune.recovery.lowrank import LowRankLinear
from shardprune.solvers.kernels import kernels_run

RANK, ALPHA = 32, 10.0
TOKENS = 4096  # of a micro-batch
ROUNDED = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def run(setting: Setting, rows: Rows) -> None:
    ways = ["kernel", "products"] if kernels_run(torch.device(setting.device)) else ["products"]
    for dtype, bound in ROUNDED.items():
        _check(dtype, bound, ways, setting, rows)
    hidden, intermediate = setting.size(8192, 128), setting.size(28672, 320)
    for shape in ((hidden, hidden), (intermediate, hidden), (hidden, intermediate)):
        _measure(shape, ways, setting, rows)


def _module(rows: int, cols: int, dtype: torch.dtype, device: str) -> LowRankLinear:
    linear = torch.nn.Linear(cols, rows, bias=False, device=device, dtype=dtype).requires_grad_(False)
    linear.weight.masked_fill_(torch.rand(rows, cols, device=device) < 0.5, 0)
    module = LowRankLinear(linear, RANK, ALPHA, dropout=0.0, masked=True)
    module.reset(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(module.lora_B, std=0.01)
    return module


def _pass(module: LowRankLinear, inputs: Tensor, gradient: Tensor, way: str) -> dict[str, Tensor]:
    """Return the outputs of a forward pass, and the gradients of a backward pass."""
    module.zero_grad()
    inputs = inputs.detach().requires_grad_()
    with patch.object(masked_update, "kernels_run", lambda _device: way == "kernel"):
        output = module(inputs)
        output.backward(gradient)
    tensors = {"inputs": inputs.grad, "A": module.lora_A.grad, "B": module.lora_B.grad}
    return {"outputs": output.detach(), **{name: tensor for name, tensor in tensors.items() if tensor is not None}}


def _check(dtype: torch.dtype, bound: float, ways: list[str], setting: Setting, rows: Rows) -> None:
    """Compare outputs and gradients with the formula in float64, for sizes that no tile divides."""
    height, width = setting.size(3000, 200), setting.size(5000, 300)
    module = _module(height, width, dtype, setting.device)
    inputs, gradient = (torch.randn(500, size, device=setting.device).to(dtype) for size in (width, height))
    weight, a, b = (tensor.detach().double() for tensor in (module.weight, module.lora_A, module.lora_B))
    mask = weight != 0
    whole, of_update = weight + mask * (module.scale * b @ a), mask * (gradient.double().T @ inputs.double())
    expected = {
        "outputs": inputs.double() @ whole.T,
        "inputs": gradient.double() @ whole,
        "A": module.scale * b.T @ of_update,
        "B": module.scale * of_update @ a.T,
    }
    for way in ways:
        found = _pass(module, inputs, gradient, way)
        distance = max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())
        rows.add(f"{way}, {dtype}: distance from float64".replace("torch.", ""), distance, ok=distance < bound)


def _measure(shape: tuple[int, int], ways: list[str], setting: Setting, rows: Rows) -> None:
    """Measure both passes beside the three products of a weight without an update, and blocks of other sizes."""
    module = _module(*shape, torch.bfloat16, setting.device)
    tokens = setting.size(TOKENS, 64)
    inputs, gradient = (torch.randn(tokens, size, device=setting.device).bfloat16() for size in reversed(shape))
    label = " x ".join(map(str, shape))

    def products() -> None:
        inputs @ module.weight.T
        gradient @ module.weight
        gradient.T @ inputs

    rows.add(f"{label}: three products of its weight", 1e3 * setting.seconds(products), "ms")
    for way in ways:
        taken = setting.seconds(lambda way=way: _pass(module, inputs, gradient, way))
        rows.add(f"{label}: {way}", 1e3 * taken, "ms")
    for block in (setting.size(4096, 64), max(shape)):
        with patch.object(masked_update, "BLOCK", block):
            taken = setting.seconds(lambda: _pass(module, inputs, gradient, ways[0]))
        rows.add(f"{label}: {ways[0]}, {block} rows or columns at a time", 1e3 * taken, "ms")
