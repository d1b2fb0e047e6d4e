"""Does it run, and is it right: Gram matrix and fine-tuning loss against float64, a solve against one on the CPU."""

import torch
from torch import Tensor, nn

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune.model.head_logits import HeadLogits
from shardprune.recovery.loss import LossHead
from shardprune.solvers.methods import METHODS, Solution, Target
from shardprune.solvers.pattern import parse_pattern
from shardprune.solvers.statistics import InputStatistics

AGREE = 0.999  # of the mask: rounding in float32 flips near-ties
CUT = 2**-28  # for each of 2,048 tokens in one product: tensor cores cut their running sums (measured: half as much)
NEAR = 1e-2  # relative distance of the weights: one flipped weight changes all that make up for it


def run(setting: Setting, rows: Rows) -> None:
    _gram(setting, rows)
    _solve(setting, rows)
    _loss(setting, rows)


def _gram(setting: Setting, rows: Rows) -> None:
    """Compare sums of bfloat16 products with float64; of a width that no panel divides, too."""
    count = setting.size(2048, 256)
    for cols in (setting.size(4096, 256), setting.size(3000, 200)):
        statistics = InputStatistics.empty("gram", cols, setting.device)
        expected = torch.zeros(cols, cols, dtype=torch.float64, device=setting.device)
        for _ in range(2):  # sequences, so that the Hessian 2/N X^T X is X^T X
            tokens = torch.randn(count, cols, device=setting.device, dtype=torch.bfloat16)
            statistics.add(tokens, 1)
            expected += tokens.double().t() @ tokens.double()
        distance = float((statistics.hessian - expected).norm() / expected.norm())
        rows.add(f"Gram matrix of {cols} inputs, distance from float64", distance, ok=distance < CUT * count)


def _solve(setting: Setting, rows: Rows) -> None:
    """Solve one projection on both devices."""
    size = setting.size(1024, 256)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    mixing = torch.eye(size) + torch.randn(size, size, generator=generator) / size**0.5
    inputs = torch.randn(4, 1024, size, generator=generator) @ mixing
    for method in ("sparsegpt", "wanda"):
        for pattern in ("unstructured", "2:4"):
            there, here = (_pruned(method, weight, inputs, pattern, device) for device in (setting.device, "cpu"))
            agree = float((there.mask.cpu() == here.mask).double().mean())
            distance = float((there.weight.cpu() - here.weight).norm() / here.weight.norm())
            rows.add(f"{method} {pattern}, masks agree with the CPU's", agree, ok=agree >= AGREE)
            rows.add(f"{method} {pattern}, distance of the weights", distance, ok=distance < NEAR)


def _pruned(method: str, weight: Tensor, inputs: Tensor, pattern: str, device: str) -> Solution:
    statistics = InputStatistics.empty("gram", weight.shape[1], device)
    statistics.add(inputs.to(device), len(inputs))
    return next(METHODS[method].solve([Target(weight.to(device), parse_pattern(pattern), 0.5)], statistics))


def _loss(setting: Setting, rows: Rows) -> None:
    """Compare the loss of a fine-tuning, which is computed a chunk of predictions at a time, and its gradient."""
    width, vocabulary, count = setting.size(1024, 64), setting.size(32768, 512), setting.size(3000, 1500)
    head = nn.Linear(width, vocabulary, bias=False, device=setting.device)
    hidden = torch.randn(count, width, device=setting.device, requires_grad=True)
    targets = torch.randint(vocabulary, (count,), device=setting.device)
    for of, made in (("loss by chunks", HeadLogits()), ("loss of scaled and capped logits", HeadLogits(4.0, 2.0))):
        hidden.grad = None
        loss = LossHead(head, made)(hidden, targets)
        loss.backward()
        exact = hidden.detach().double().requires_grad_()
        logits = made.scale * exact @ head.weight.detach().double().t()
        if made.cap is not None:
            logits = made.cap * (logits / made.cap).tanh()
        expected = nn.functional.cross_entropy(logits, targets, reduction="sum")
        expected.backward()
        assert hidden.grad is not None
        assert exact.grad is not None
        distance = float((hidden.grad - exact.grad).norm() / exact.grad.norm())
        off = float((loss.detach() / expected.detach() - 1).abs())
        rows.add(f"{of}, distance from float64", off, ok=off < 1e-5)
        rows.add("its gradient, distance from float64", distance, ok=distance < 1e-5)
