"""The simulated GPU itself: it refuses what CUDA refuses, and counts what CUDA waits for."""

import threading

import pytest
import torch

from tests.support.simulated_cuda import needs_simulated_cuda, simulated_cuda, to_cpu

pytestmark = needs_simulated_cuda


@pytest.fixture
def gpu():
    with simulated_cuda(memory=10**6) as gpu:
        yield gpu


MIXED = {
    "sum": lambda here, there: there + here,
    "product": lambda here, there: there @ here,
    "written into": lambda here, there: here.add_(there),
    "result": lambda here, there: torch.mul(there, there, out=here),
    "choice": lambda here, there: torch.where(there > 0, there, here),
    "mask": lambda here, there: here[there > 0],
    "joined": lambda here, there: torch.cat([here, there]),
    "attention": lambda here, there: torch.nn.functional.scaled_dot_product_attention(there, here, there),
}


@pytest.mark.parametrize("name", MIXED)
def test_operations_on_two_devices_are_refused(gpu, name):
    here, there = torch.ones(4, 4), torch.ones(4, 4, device="cuda")
    with pytest.raises((RuntimeError, AssertionError), match="same device|two devices"):
        MIXED[name](here, there)


def test_numbers_and_indices_of_the_cpu_are_taken(gpu):
    there = torch.arange(6.0, device="cuda")
    assert torch.equal(to_cpu(there * torch.tensor(2.0)), torch.arange(6.0) * 2)
    assert torch.equal(to_cpu(there[torch.tensor([1, 5])]), torch.tensor([1.0, 5.0]))


def test_values_do_not_leave_the_device_by_themselves(gpu):
    with pytest.raises(TypeError, match="can't convert cuda"):
        torch.ones(3, device="cuda").numpy()


WAITS = {
    "number": (lambda there: float(there.sum()), 1),
    "truth": (lambda there: bool((there > 0).all()), 1),
    "list": (lambda there: there.tolist(), 1),
    "places": (lambda there: there.nonzero(), 1),
    "mask": (lambda there: there[there > 0], 1),
    "to the host": (lambda there: there.cpu(), 1),
    "to the host, not blocking": (lambda there: there.to("cpu", non_blocking=True), 0),
    "to the device": (lambda there: torch.ones(3).to("cuda"), 1),
    "pageable, not blocking": (lambda there: torch.ones(3).to("cuda", non_blocking=True), 1),
    "pinned": (lambda there: torch.ones(3).pin_memory().to("cuda"), 1),
    "pinned, not blocking": (lambda there: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
    "into pinned memory": (lambda there: torch.empty(4, pin_memory=True).copy_(there, non_blocking=True), 0),
    "into pageable memory": (lambda there: torch.empty(4).copy_(there, non_blocking=True), 1),
    "arithmetic": (lambda there: there.add_(1).topk(2), 0),
    "everything": (lambda there: torch.cuda.synchronize(), 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_the_host_waits_for_is_counted(gpu, name):
    step, waits = WAITS[name]
    there = torch.arange(4.0, device="cuda")
    gpu.counts.clear()
    step(there)
    assert gpu.counts.total().syncs == waits


def test_launches_and_bytes_are_counted(gpu):
    there = torch.ones(10, 10).to("cuda")
    gpu.counts.clear()
    view = there.t()[2:5]
    assert gpu.counts.total().launches == 0
    (view @ there).cpu()
    total = gpu.counts.total()
    assert (total.launches, total.to_host, total.to_device) == (2, 4 * 30, 0)
    assert gpu.counts.arithmetic == {"float32 narrow": 2 * 30 * 10}


def test_streams_and_events_take_what_cuda_s_take(gpu):
    there, side = torch.ones(4, device="cuda"), torch.cuda.Stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
        copied = there.to("cpu", non_blocking=True)
        there.record_stream(side)
        end.record(side)
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    assert copied.is_pinned()
    assert end.query()
    end.synchronize()
    assert start.elapsed_time(end) >= 0
    with pytest.raises(AssertionError, match="enable_timing"):
        torch.cuda.Event().elapsed_time(end)


def test_threads_have_the_device_too(gpu):
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(3, device="cuda") + 1))
    thread.start()
    thread.join()
    assert made[0].is_cuda


def test_memory_is_counted_and_ends(gpu):
    before = torch.cuda.memory_allocated()
    large = torch.empty(100_000, device="cuda")
    view = large[:10]
    assert torch.cuda.memory_allocated() == before + 400_000
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(200_000, device="cuda")
    del large, view
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == before + 400_000


def test_the_device_is_gone_afterwards():
    with simulated_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        torch.ones(3, device="cuda")
