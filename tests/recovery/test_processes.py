"""How many processes share a batch, and which GPU each takes."""

import os
from types import SimpleNamespace

import pytest
import torch

from shardprune.recovery.batches import Processes, micro_batch_of
from shardprune.recovery.worker import _prepare


@pytest.mark.parametrize(("slots", "left"), [(9, 8), (8, 8), (7, 4), (5, 4), (3, 2), (1, 1)])
def test_fewer_processes_share_a_batch_evenly(slots, left):
    assert Processes(8, 16, 2).shrunk_to(slots) == Processes(left, 16, 2)


def test_a_batch_that_only_odd_numbers_share():
    assert [Processes(3, 9, 1).shrunk_to(slots).count for slots in (3, 2, 1)] == [3, 1, 1]


@pytest.mark.parametrize(
    ("batch", "processes", "length", "micro"),
    [(16, 1, 512, 8), (16, 4, 512, 4), (16, 1, 8192, 1), (12, 1, 512, 6), (7, 1, 1024, 1), (16, 1, 16, 16)],
)
def test_a_micro_batch_is_about_4096_tokens_and_divides_its_part(batch, processes, length, micro):
    assert micro_batch_of(batch, processes, length) == micro


@pytest.mark.parametrize("index", [0, 3])
def test_deepspeed_takes_the_gpu_that_the_process_was_given(monkeypatch, index):
    """The rank on the node is another number where every process sees its own GPU alone."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "7")
    _prepare(SimpleNamespace(recipe=SimpleNamespace(threads=1, device="cuda")), torch.device("cuda", index))
    assert taken == [torch.device("cuda", index)]
    assert os.environ["LOCAL_RANK"] == str(index)
