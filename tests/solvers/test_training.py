"""The course of a reconstruction."""

import math

import pytest

from shardprune.solvers.training import rate_at, windows_of_steps


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_rate_warms_up_over_a_tenth_and_falls_as_a_cosine(steps):
    rising = max(1, steps // 10)
    expected = [
        (step + 1) / rising if step < rising else (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2
        for step in range(steps)
    ]
    found = [rate_at(step, steps) for step in range(steps)]
    assert found == pytest.approx(expected)
    assert max(found) == 1
    assert steps == 1 or found[-1] < 0.5


@pytest.mark.parametrize(("windows", "seqlen", "size"), [(57, 256, 8), (115, 2048, 1), (4, 24, 4), (10, 4096, 1)])
def test_every_window_has_its_turn_before_any_comes_again(windows, seqlen, size):
    drawn = [*windows_of_steps(windows, seqlen, 40, seed=3)]
    assert drawn == [*windows_of_steps(windows, seqlen, 40, seed=3)]
    assert drawn != [*windows_of_steps(windows, seqlen, 40, seed=4)]
    assert [len(step) for step in drawn] == [size] * 40
    round_of = windows // size  # steps until less is left than one takes
    for start in range(0, 40, round_of):
        seen = [window for step in drawn[start : start + round_of] for window in step]
        assert len(set(seen)) == len(seen)
        assert {*seen} <= {*range(windows)}
