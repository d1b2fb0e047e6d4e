"""Rates of the operations that a layer's time is made of: products, Gram matrices, selections, attention, copies."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.results import Rows
from benchmarks.gpu.setting import Setting
from shardprune.recovery.packed_attention import BOUNDS, attend, bounds_of
from shardprune.shard.cuda import without_cudnn_attention
from shardprune.solvers.products import add_product
from shardprune.solvers.selection import kth_value
from shardprune.solvers.statistics import InputStatistics

WAVE = 64 * 2**20  # bytes of a wave of Llama-70B: 2 x 2048 x 8192 in bfloat16


def run(setting: Setting, rows: Rows) -> None:
    _products(setting, rows)
    _gram_matrices(setting, rows)
    _updates(setting, rows)
    _attention(setting, rows)
    _packed_attention(setting, rows)
    _copies(setting, rows)


def _products(setting: Setting, rows: Rows) -> None:
    """Measure products of square matrices; `add_product` is the solvers' own, in float32's accuracy."""
    size = setting.size(8192, 256)
    operations = 2 * size**3

    def rate(label: str, seconds: float) -> None:
        rows.add(f"product of {size}^3, {label}", operations / seconds / 1e12, "TFLOP/s")

    narrow = torch.randn(size, size, device=setting.device).bfloat16()
    rate("bfloat16", setting.seconds(lambda: narrow @ narrow))
    wide = torch.randn(size, size, device=setting.device)
    rate("float32", setting.seconds(lambda: wide @ wide))
    if setting.cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        rate("TF32", setting.seconds(lambda: wide @ wide))
        torch.backends.cuda.matmul.allow_tf32 = False
    target = torch.zeros_like(wide)
    rate("add_product", setting.seconds(lambda: add_product(target, wide, wide)))
    reference = wide[:64].double() @ wide.double()

    def distance(product: Tensor) -> float:
        return float((product[:64] - reference).norm() / reference.norm())

    plain, ours = distance(wide @ wide), distance(add_product(torch.zeros_like(wide), wide, wide))
    rows.add("float32 product, distance from float64", plain)
    rows.add("add_product, distance from float64", ours, ok=ours < 4 * plain)


def _gram_matrices(setting: Setting, rows: Rows) -> None:
    for cols in (setting.size(8192, 256), setting.size(28672, 512)):
        tokens = torch.randn(setting.size(4096, 128), cols, device=setting.device).bfloat16()
        statistics = InputStatistics.empty("gram", cols, setting.device)
        taken = setting.seconds(lambda tokens=tokens, statistics=statistics: statistics.add(tokens, 2))
        rows.add(f"Gram matrix of {cols} inputs, {len(tokens)} tokens", 1e3 * taken, "ms")


def _updates(setting: Setting, rows: Rows) -> None:
    """Measure the work of a block of SparseGPT beside its column steps: 28,672 rows, 8,192 columns to its right."""
    count, right = setting.size(28672, 256), setting.size(8192, 128)
    columns = torch.randn(right, count, device=setting.device)
    lost, steps = columns[:128].clone(), torch.randn(128, right, device=setting.device)
    taken = setting.seconds(lambda: add_product(columns, steps.t(), lost, alpha=-1e-3))
    rows.add(f"update of {right} x {count} by 128 columns", 1e3 * taken, "ms")
    scores = columns[:128].reshape(-1)
    taken = setting.seconds(lambda: kth_value(scores, len(scores) // 2))
    rows.add(f"k-th value of {len(scores):,}", 1e3 * taken, "ms")


def _attention(setting: Setting, rows: Rows) -> None:
    """Measure attention whose length is another in each call: of one new token, and of whole sequences with their
    gradients."""
    heads, longest = setting.size(64, 2), setting.size(1024, 64)
    for way, context in (("as PyTorch chooses", nullcontext), ("without cuDNN", without_cudnn_attention)):
        lengths = iter(range(longest, 0, -1))
        keys = torch.randn(8, heads, longest, 128, device=setting.device).bfloat16()

        def one_token(keys: Tensor = keys) -> None:
            seen = keys[:, :, : next(lengths)]
            scaled_dot_product_attention(keys[:, :, :1], seen, seen)

        def sequences(keys: Tensor = keys) -> None:
            whole = keys[:, :, : next(lengths)].requires_grad_()
            scaled_dot_product_attention(whole, whole, whole, is_causal=True).sum().backward()

        for label, work in (("one token", one_token), ("sequences and gradients", sequences)):
            with context():
                rows.add(f"attention of a new length, {label}, {way}", 1e3 * setting.seconds(work), "ms")


def _packed_attention(setting: Setting, rows: Rows) -> None:
    """Measure attention of two rows that hold 16 examples each, with gradients: by a mask, and by examples."""
    heads, length = setting.size(64, 4), setting.size(2048, 64)
    position_ids = torch.arange(length, device=setting.device).remainder(length // 16).expand(2, -1)
    bounds, examples = bounds_of(position_ids), (position_ids == 0).cumsum(1)
    mask = (examples[:, :, None] == examples[:, None, :]).tril()[:, None]
    query, key, value = (
        torch.randn(2, count, length, 128, device=setting.device).bfloat16().requires_grad_()
        for count in (heads, heads // 4, heads // 4)
    )

    def masked() -> Tensor:
        repeated = (one.repeat_interleave(4, 1) for one in (key, value))  # as transformers does under a mask
        return scaled_dot_product_attention(query, *repeated, mask).transpose(1, 2)

    def by_examples() -> Tensor:
        return attend(torch.nn.Identity(), query, key, value, None, **{BOUNDS: bounds})[0]

    for label, work in (("by mask", masked), ("by examples", by_examples)):
        taken = setting.seconds(lambda work=work: work().sum().backward())
        rows.add(f"attention of packed rows and gradients, {label}", 1e3 * taken, "ms")
    expected, found = masked().detach().float(), by_examples().detach().float()
    distance = float((found - expected).norm() / expected.norm())
    rows.add("attention of packed rows, distance of the two", distance, ok=distance < 0.02)


def _copies(setting: Setting, rows: Rows) -> None:
    def rate(label: str, size: int, seconds: float) -> None:
        rows.add(label, size / seconds / 1e9, "GB/s")

    size = setting.size(2**31, 2**20)
    source = torch.empty(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    rate("copy on the device, read and written", 2 * size, setting.seconds(lambda: target.copy_(source)))
    if not setting.cuda:
        return
    here = torch.empty(WAVE, dtype=torch.uint8, device=setting.device)
    for label, pinned in (("pageable", False), ("pinned", True)):
        host = torch.zeros(WAVE, dtype=torch.uint8, pin_memory=pinned)
        for way, into, out_of in (("to the device", here, host), ("to the host", host, here)):
            taken = setting.seconds(lambda into=into, out_of=out_of: into.copy_(out_of, non_blocking=True))
            rate(f"64 MiB {way}, {label}", WAVE, taken)
