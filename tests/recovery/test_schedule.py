"""The learning rate by hand."""

import pytest

from shardprune.recovery.schedule import learning_rate


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [4, 8, 8, 8, 8, 8, 8, 8, 8, 8]),
        ("linear", [4, 8, 8, 7, 6, 5, 4, 3, 2, 1]),
        ("cosine", [4, 8, 8, 7.6955, 6.8284, 5.5307, 4, 2.4693, 1.1716, 0.3045]),
    ],
)
def test_it_rises_and_falls(shape, expected):
    rates = [learning_rate(step, 10, 8.0, 0.2, shape) for step in range(10)]
    assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 0.04, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_has_a_rate_and_none_is_too_high(shape, warmup, steps):
    rates = [learning_rate(step, steps, 1.0, warmup, shape) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1
