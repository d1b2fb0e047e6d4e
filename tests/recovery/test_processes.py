"""How many processes share a batch."""

import pytest

from shardprune.recovery.batches import Processes, micro_batch_of


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
