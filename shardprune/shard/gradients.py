"""Gradients of a layer's output error that are the same to the bit every time, in every dtype."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def power_near_one(error: Tensor) -> float:
    """Return a power of two that brings the gradient of ||error||^2 by the output near 1: what flows further back from
    there would vanish in float16. It is exact in every dtype, and taken back in float32."""
    largest = float(error.abs().max())
    return 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0


@contextmanager
def repeatable(device: torch.device, gradients: bool) -> Iterator[None]:
    """Attention whose gradient is the same to the bit every time: on a GPU the fused kernels add in any order."""
    if device.type == "cuda" and gradients:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
