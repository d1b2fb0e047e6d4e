"""Settings of CUDA: what the environment may say, and what a process then computes with."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from shardprune.cluster.defaults import device_of
from shardprune.cluster.group import Slots
from shardprune.errors import InputError
from shardprune.shard.cuda import ALLOCATOR, check_tf32, keep_float32, set_allocator, without_cudnn_attention
from shardprune.shard.device_errors import context_is_dead, is_out_of_memory

GPUS = Slots(cpus=4, gpus=2, cpus_of_a_node=4)


@pytest.mark.parametrize("value", ["1", "2", "true"])
def test_an_environment_that_forces_tf32_is_refused_for_gpus_alone(monkeypatch, value):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    with pytest.raises(InputError, match=f"^NVIDIA_TF32_OVERRIDE: '{value}' .* unset, or 0$"):
        device_of("auto", GPUS)
    with pytest.raises(InputError, match="NVIDIA_TF32_OVERRIDE"):
        keep_float32()
    assert device_of("cpu", GPUS) == "cpu"


@pytest.mark.parametrize("environment", [{}, {"NVIDIA_TF32_OVERRIDE": "0"}, {"NVIDIA_TF32_OVERRIDE": ""}])
def test_one_that_forbids_tf32_is_taken(environment):
    check_tf32(environment)


def test_float32_is_kept_whatever_the_environment_has_switched_on():
    program = (
        "import torch; m = torch.backends.cuda.matmul; assert m.allow_tf32;"
        "from shardprune.shard.cuda import keep_float32; keep_float32();"
        "print(m.allow_tf32, torch.backends.cudnn.allow_tf32, m.allow_bf16_reduced_precision_reduction,"
        " m.allow_fp16_reduced_precision_reduction, torch.get_float32_matmul_precision())"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "False", "False", "highest"]


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_takes_part_in_attention_again_as_before(before):
    found = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with suppress(ZeroDivisionError), without_cudnn_attention():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise ZeroDivisionError
        assert torch.backends.cuda.cudnn_sdp_enabled() is before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(found)


@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}]
)
def test_the_allocator_is_set_where_the_user_has_not(monkeypatch, given):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_allocator()
    found = {name: os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF") if name in os.environ}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that what was set is taken back
    assert found == (given or {"PYTORCH_ALLOC_CONF": ALLOCATOR})


@pytest.mark.gpu
def test_pytorch_takes_the_allocator_s_settings():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    program = (
        "from shardprune.shard.cuda import set_allocator; set_allocator();"
        "import torch; torch.ones(2**26, device='cuda'); torch.ones(3 * 2**20).pin_memory();"
        "print(torch.cuda.memory_snapshot()[0]['is_expandable'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def failure(kind: type[RuntimeError], text: str, code: int | None = None) -> RuntimeError:
    error = kind(text)
    if code is not None:
        error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "too_small", "dead"),
    [
        (failure(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."), True, False),
        (failure(torch.AcceleratorError, "CUDA error: out of memory", 2), True, False),
        (failure(RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True, False),
        (failure(torch.AcceleratorError, "CUDA error: an illegal memory access was encountered", 700), False, True),
        (failure(torch.AcceleratorError, "CUDA error: uncorrectable ECC error encountered"), False, True),
        (failure(RuntimeError, "Expected all tensors to be on the same device"), False, False),
        (ValueError("CUDA error"), False, False),
    ],
)
def test_errors_of_a_device_are_told_apart(error, too_small, dead):
    assert (is_out_of_memory(error), context_is_dead(error)) == (too_small, dead)
