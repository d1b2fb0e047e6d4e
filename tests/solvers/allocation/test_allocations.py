"""Allocations against the papers' formulae and the authors' arithmetic, written out plainly."""

import numpy as np
import pytest

from shardprune.recipes.prune import AllocationName
from shardprune.solvers.allocation.allocation import Projection
from shardprune.solvers.allocation.allocations import ALLOCATIONS
from shardprune.solvers.allocation.budget import HIGHEST, meet
from shardprune.solvers.allocation.mixed import in_groups, nearness, nonzeros_in_all
from shardprune.solvers.outliers import Outliers

SIZES = {"q": 400, "k": 100, "up": 1300, "down": 900}
LAYERS = 6
PROJECTIONS = [Projection(layer, name, size) for layer in range(LAYERS) for name, size in SIZES.items()]
EXACT = [name for name, allocation in ALLOCATIONS.items() if allocation.exact and allocation.allocate]


def some_outliers(seed: int = 0, scale: float = 5.0) -> list[Outliers]:
    generator = np.random.default_rng(seed)
    return [
        Outliers(scale * generator.random(), {name: scale * generator.random() for name in SIZES})
        for _ in range(LAYERS)
    ]


def mean(sparsities) -> float:
    spent = sum(sparsities[projection.layer, projection.name] * projection.weights for projection in PROJECTIONS)
    return spent / sum(projection.weights for projection in PROJECTIONS)


def test_the_recipe_offers_what_the_table_has():
    assert set(AllocationName.__args__) == ALLOCATIONS.keys()


@pytest.mark.parametrize("spread", [0.02, 0.08, 0.2])
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_owl_is_the_papers_arithmetic(target, spread):
    outliers = some_outliers()
    ratios = np.array([layer.layer for layer in outliers])
    density = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * spread * 2)
    density = density - density.mean() + (1 - target)
    sparsities = ALLOCATIONS["owl"].allocate(PROJECTIONS, outliers, target, spread)
    for projection in PROJECTIONS:
        expected = 1 - density[projection.layer]
        assert sparsities[projection.layer, projection.name] == pytest.approx(expected, abs=1e-9)
    least, most = ratios.argmin(), ratios.argmax()
    assert sparsities[least, "q"] - sparsities[most, "q"] == pytest.approx(2 * spread)


def test_mosaic_is_one_profile_over_all_projections():
    outliers, target, spread = some_outliers(), 0.6, 0.08
    ratios = {(p.layer, p.name): outliers[p.layer].projections[p.name] for p in PROJECTIONS}
    low, high = min(ratios.values()), max(ratios.values())
    profile = {key: (ratio - low) / (high - low) * 2 * spread for key, ratio in ratios.items()}
    weights = {(p.layer, p.name): p.weights for p in PROJECTIONS}
    centre = sum(profile[key] * weights[key] for key in profile) / sum(weights.values())
    sparsities = ALLOCATIONS["mosaic"].allocate(PROJECTIONS, outliers, target, spread)
    for key, value in profile.items():
        assert sparsities[key] == pytest.approx(1 - (value - centre + 1 - target), abs=1e-9)


@pytest.mark.parametrize("target", [0.05, 0.7])
def test_mosaic_as_released(target):
    outliers, spread = some_outliers(3), 0.08

    def scaled(values):
        values = np.array(values)
        return (values - values.min()) / (values.max() - values.min()) * 2 * spread

    layers = scaled([layer.layer for layer in outliers])
    sparsities = ALLOCATIONS["mosaic-released"].allocate(PROJECTIONS, outliers, target, spread)
    for name in SIZES:
        own = scaled([layer.projections[name] for layer in outliers])
        for layer in range(LAYERS):
            expected = max(1 - (layers[layer] - own.mean() + (1 - target)), 0.01)
            assert sparsities[layer, name] == pytest.approx(expected, abs=1e-9)
    assert abs(mean(sparsities) - target) > 1e-3


def test_mosaic_as_released_empties_no_projection():
    sparsities = ALLOCATIONS["mosaic-released"].allocate(PROJECTIONS, some_outliers(), 0.95, 0.3)
    assert max(sparsities.values()) == HIGHEST


@pytest.mark.parametrize("allocation", EXACT)
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.5])
@pytest.mark.parametrize("target", [0.0, 0.03, 0.5, 0.9, 0.97, 0.985])
def test_the_mean_is_the_target_even_where_values_are_clipped(allocation, spread, target):
    sparsities = ALLOCATIONS[allocation].allocate(PROJECTIONS, some_outliers(1), target, spread)
    assert mean(sparsities) == pytest.approx(target, abs=1e-12)
    assert all(0 <= sparsity <= HIGHEST for sparsity in sparsities.values())


@pytest.mark.parametrize("allocation", [name for name, allocation in ALLOCATIONS.items() if allocation.allocate])
def test_ratios_that_do_not_differ_leave_nothing_to_share_out(allocation):
    same = [Outliers(1.5, dict.fromkeys(SIZES, 2.0)) for _ in range(LAYERS)]
    sparsities = ALLOCATIONS[allocation].allocate(PROJECTIONS, same, 0.7, 0.08)
    assert all(sparsity == pytest.approx(0.7, abs=1e-12) for sparsity in sparsities.values())


def test_what_clipping_takes_is_spread_evenly_over_the_rest():
    found = meet(np.array([0.0, 0.1, 0.5]), [1, 1, 1], 0.7)
    assert found[2] == HIGHEST
    assert found[:2].sum() == pytest.approx(3 * 0.7 - HIGHEST)
    assert found[1] - found[0] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="have the mean"):
        meet(np.zeros(3), [1, 1, 1], 0.995)


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 25 / 48])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.3])
def test_mixed_counts_are_whole_and_have_the_mean(target, spread):
    owl = ALLOCATIONS["owl"].allocate(PROJECTIONS, some_outliers(2), target, spread)
    mixed = in_groups(owl, target, 8, dict.fromkeys(range(LAYERS), sum(SIZES.values())))
    counts = [8 * (1 - mixed[layer, "q"]) for layer in range(LAYERS)]
    assert all(count == int(count) and 1 <= count <= 8 for count in counts)
    assert sum(counts) == pytest.approx(8 * LAYERS * (1 - target))
    assert all(mixed[layer, name] == mixed[layer, "q"] for layer in range(LAYERS) for name in SIZES)
    order = sorted(range(LAYERS), key=lambda layer: owl[layer, "q"])  # most outliers first
    assert [counts[layer] for layer in order] == sorted(counts, reverse=True)


def test_mixed_counts_are_the_nearest():
    wanted = {(layer, "q"): 1 - count / 8 for layer, count in enumerate((2.2, 3.8, 4.0, 5.9, 0.1))}
    mixed = in_groups(wanted, 1 - 16 / 40, 8, dict.fromkeys(range(5), 7))
    assert [round(8 * (1 - mixed[layer, "q"])) for layer in range(5)] == [2, 3, 4, 6, 1]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.51, 0.7, 0.875])
def test_mixed_counts_of_layers_of_different_sizes_come_near(target):
    sizes = {0: 1000, 1: 3000, 2: 3100, 3: 500, 4: 2900}
    wanted = {(layer, "q"): target + 0.02 * (layer - 2) for layer in sizes}
    mixed = in_groups(wanted, target, 8, sizes)
    counts = [8 * (1 - mixed[layer, "q"]) for layer in sizes]
    assert all(count == int(count) and 1 <= count <= 8 for count in counts)
    assert all(abs(count - 8 * (1 - wanted[layer, "q"])) <= 1.5 for layer, count in enumerate(counts))
    away = sum(size * (mixed[layer, "q"] - target) for layer, size in sizes.items())
    assert abs(away) / sum(sizes.values()) <= nearness(8, sizes.values()) == 3100 / 16 / 10500


@pytest.mark.parametrize(
    ("target", "near"), [(0.7, "0.6875 or 0.7083"), (0.9, "0.8750"), (0.51, "0.5000 or 0.5208"), (0.999, "0.8750")]
)
def test_a_mean_that_no_counts_have(target, near):
    with pytest.raises(ValueError, match=f"N of 8 over 6 layers cannot average to it; the nearest is {near}$"):
        nonzeros_in_all(target, 6, 8)
