"""Settings of CUDA in a process that computes on it: float32 stays float32, how memory is allocated, and which
attention kernel runs where every call has another length."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from shardprune.errors import InputError

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"  # read by CUDA's libraries themselves; 0 forbids TF32, all else is undefined

# Blocks of gigabytes come and go: segments that grow leave no holes. Buffers of the size that they are asked for:
# pinned memory of CUDA's own allocator is rounded up to powers of two.
ALLOCATOR = "expandable_segments:True,pinned_use_cuda_host_register:True"
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second has precedence


def check_tf32(environment: Mapping[str, str] = os.environ) -> None:
    """Raise an error where the environment makes CUDA's libraries round float32 to TF32, which no process can undo.

    Hessians of a condition near 10^5 are not positive definite then.

    Raises:
        InputError: names the variable.
    """
    value = environment.get(TF32_OVERRIDE, "")
    if value not in ("", "0"):
        raise InputError(
            TF32_OVERRIDE, f"{value!r} makes CUDA round float32 to TF32 everywhere; leave the variable unset, or 0"
        )


def keep_float32() -> None:
    """Compute float32 products in float32 and sum those of 16-bit numbers in float32, in this process.

    This also takes back what TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 has switched on. A call that may use TF32 switches it
    on for itself.

    Raises:
        InputError: the environment makes that impossible.
    """
    check_tf32()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def set_allocator() -> None:
    """Set PyTorch's allocator in this process, where its environment does not.

    It reads its settings when CUDA is first used, so that this comes before.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = ALLOCATOR


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Run attention by kernels that take any length as it comes.

    PyTorch prefers cuDNN's attention on Hopper and later, which builds a plan for every shape that is new to it: tens
    of milliseconds, more than a whole step of one token through a shard.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
