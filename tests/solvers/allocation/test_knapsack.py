"""The knapsack over error curves, against all allocations that there are."""

import itertools
import math

import pytest

from shardprune.solvers.allocation.knapsack import share_out

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)


def exponential(height: float, slope: float) -> list[tuple[float, float]]:
    return [(level, height * math.exp(slope * level)) for level in LEVELS]


def test_meets_the_target_and_no_other_allocation_adds_less():
    weights = {(0, "a"): 100, (0, "b"): 300, (1, "a"): 200}
    form = {(0, "a"): (1e-3, 9.0), (0, "b"): (4e-4, 12.0), (1, "a"): (2e-2, 6.0)}
    curves = {place: exponential(*values) for place, values in form.items()}

    def total(sparsities):
        return sum(height * math.exp(slope * t) for (height, slope), t in zip(form.values(), sparsities, strict=True))

    found = share_out(curves, weights, 0.7)
    assert sum(found[place] * weights[place] for place in weights) == pytest.approx(0.7 * 600, abs=1e-9)
    grid = [0.5 + 0.01 * place for place in range(41)]
    allowed = []
    for first, second in itertools.product(grid, grid):
        third = (0.7 * 600 - 100 * first - 300 * second) / 200
        if 0.5 <= third <= 0.9:
            allowed.append(total((first, second, third)))
    assert total(found.values()) <= min(allowed) * 1.002
    assert total(found.values()) < 0.97 * total([0.7] * 3)


def test_equal_curves_share_equally_and_scale_does_not_matter():
    weights = {(layer, "a"): 50 for layer in range(4)}
    for height in (1e-30, 1.0, 1e12):
        found = share_out({place: exponential(height, 7.0) for place in weights}, weights, 0.64)
        assert max(found.values()) - min(found.values()) <= 0.01 + 1e-9
        assert sum(found.values()) / 4 == pytest.approx(0.64, abs=1e-12)


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_the_ends_of_the_curves_can_be_asked_for(target):
    weights = {(0, "a"): 10, (0, "b"): 30}
    found = share_out({(0, "a"): exponential(1, 5), (0, "b"): exponential(2, 9)}, weights, target)
    assert list(found.values()) == pytest.approx([target] * 2, abs=1e-9)


def test_the_highest_level_is_found_whatever_the_last_bit_of_a_mean():
    """Shares of all weights may add up to less than 1, so that no price makes their mean as high as asked for."""
    sizes = [589824, 589824, 1769472, 1769472, 7, 11]
    for count in range(1, 60):
        weights = {(layer, str(place)): size for layer in range(count) for place, size in enumerate(sizes)}
        found = share_out({place: exponential(1, 5 + place[0] % 3) for place in weights}, weights, 0.9)
        assert sum(found[place] * size for place, size in weights.items()) == pytest.approx(
            0.9 * sum(weights.values()), rel=1e-9
        )


def test_levels_may_be_nearer_than_the_sparsities_that_are_compared():
    weights = {(0, "a"): 10, (0, "b"): 30}
    curves = {place: [(0.498, 0.1), (0.502, 0.2)] for place in weights}
    found = share_out(curves, weights, 0.5)
    assert sum(found[place] * size for place, size in weights.items()) == pytest.approx(0.5 * 40, abs=1e-9)


def test_a_projection_that_loses_nothing_gives_up_most():
    weights = {(0, "a"): 10, (0, "b"): 10}
    found = share_out({(0, "a"): [(level, 0.0) for level in LEVELS], (0, "b"): exponential(1, 9)}, weights, 0.7)
    assert found[0, "a"] == pytest.approx(0.9)
    assert found[0, "b"] == pytest.approx(0.5)


@pytest.mark.parametrize("target", [0.4, 0.95])
def test_a_target_beyond_the_curves_is_refused(target):
    with pytest.raises(ValueError, match=f"curves from 0.5 to 0.9 say nothing of a sparsity of {target}"):
        share_out({(0, "a"): exponential(1, 5)}, {(0, "a"): 10}, target)
