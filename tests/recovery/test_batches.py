"""Which rows a step has, whoever works on it."""

from itertools import chain

import pytest
import torch

from shardprune.recovery.batches import Batches
from shardprune.recovery.rows import Example, Rows


def batches(count=10, batch=4, micro=1, seed=0):
    examples = [
        Example(torch.arange(index + 2, dtype=torch.int32), torch.ones(index + 2, dtype=torch.bool))
        for index in range(count)
    ]
    return Batches(Rows.of([[example] for example in examples]), batch, micro, seed)


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    made = batches()
    sequence = list(chain.from_iterable(made.step(step) for step in range(10)))
    epochs = [sequence[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_is_the_same_whichever_came_before():
    made = batches()
    steps = [made.step(step) for step in range(10)]
    assert [batches().step(step) for step in reversed(range(10))] == steps[::-1]
    assert [made.step(step) for step in (7, 2)] == [steps[7], steps[2]]
    assert batches(seed=1).step(0) != steps[0]


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batches(count=3, batch=9).step(0)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(("micro", "processes"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_micro_batches_share_out_a_step(micro, processes, step):
    made = batches(micro=micro)
    parts = [list(made.of(step, process, processes)) for process in range(processes)]
    assert {len(part) for part in parts} == {4 // (micro * processes)}
    assert all(len(piece.rows) == micro for part in parts for piece in part)
    alone = list(made.of(step, 0, 1))
    assert list(chain.from_iterable(piece.rows for piece in alone)) == made.step(step)
    # In turn, each with the seed that it has whoever works on it.
    assert [piece for turn in zip(*parts, strict=True) for piece in turn] == alone


def test_seeds_differ_from_micro_batch_to_micro_batch():
    made = batches()
    seeds = [piece.seed for step in range(20) for piece in made.of(step, 0, 1)]
    assert len(set(seeds)) == 80


def test_targets_are_counted():
    made = batches()
    assert made.targets(0) == sum(index + 1 for index in made.step(0))
