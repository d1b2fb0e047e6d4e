"""Scores of experts, and which of them stay."""

import random

import pytest
import torch

from shardprune.solvers.expert_scores import ROUTED, ExpertStatistics, chosen, kept_of, super_experts

STATISTICS = ExpertStatistics((4, 0, 2), (1.0, 0.0, 1.5), (8.0, 0.0, 2.0), (3.0, 0.0, 1.8), (20.0, 0.0, 2.5), (5, 0, 1))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("reap", [0.75, 0, 0.9]),
        ("frequency", [4, 0, 2]),
        ("weighted-frequency", [1.0, 0, 1.5]),
        ("ean", [8.0, 0, 2.0]),
        ("mean-norm", [2.0, 0, 1.0]),
    ],
)
def test_scores_are_means_and_sums_over_routed_tokens(score, expected):
    assert list(ROUTED[score](STATISTICS)) == pytest.approx(expected)


def test_the_weight_that_was_lost_is_that_of_those_that_went():
    assert STATISTICS.lost((0, 1)) == pytest.approx(0.6)
    assert STATISTICS.lost((0, 1, 2)) == 0
    assert ExpertStatistics((0,), (0.0,), (0.0,), (0.0,), (0.0,), (0.0,)).lost(()) == 0


def test_the_highest_scores_stay_of_each_group_and_of_equal_ones_the_first():
    assert chosen([3, 1, 2, 2], 2) == (0, 2)
    assert chosen([3, 1, 2, 2], 3) == (0, 2, 3)
    assert chosen([9, 8, 7, 6, 1, 2, 3, 4], 4, groups=2) == (0, 1, 6, 7)
    assert chosen([9, 8, 7, 6, 1, 2, 3, 4], 4, groups=2, protected=[3, 4]) == (0, 3, 4, 7)
    with pytest.raises(AssertionError):
        chosen([1, 2, 3, 4], 3, groups=2)


def test_super_experts_are_extreme_and_early():
    draw = random.Random(0)
    maxima = {layer: [draw.uniform(1, 2) for _ in range(64)] for layer in range(2, 10)}
    maxima[3][5], maxima[9][7] = 300.0, 400.0
    quantile = float(torch.quantile(torch.tensor([v for own in maxima.values() for v in own]).double(), 0.995))
    assert 1 < quantile < 40  # so that a tenth of the largest decides
    found = super_experts(maxima)
    assert found[3] == {5}
    assert found[9] == frozenset()  # among the last quarter
    assert not any(found[layer] for layer in maxima if layer != 3)
    assert super_experts({}) == {}


def test_a_quantile_lies_between_two_values():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    own = super_experts({0: values.tolist(), 1: [0.0]})[0]
    bound = float(torch.quantile(torch.cat([values, torch.zeros(1).double()]), 0.995))
    assert values.max() / 10 < bound < values.max()
    assert own == {place for place, value in enumerate(values.tolist()) if value > bound}


@pytest.mark.parametrize(
    ("experts", "share", "multiple", "kept"),
    [
        (128, 0.25, 8, 96),
        (128, 0.3, 8, 88),
        (160, 0.25, 8, 120),
        (60, 0.1, 8, 56),
        (8, 0.25, 8, 8),
        (512, 0.299, 1, 359),
    ],
)
def test_what_stays_is_the_nearest_multiple(experts, share, multiple, kept):
    assert kept_of(experts, share, multiple) == kept
