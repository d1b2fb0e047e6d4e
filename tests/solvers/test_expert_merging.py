"""Clusters of experts, against average linkage written plainly."""

import itertools

import pytest
import torch

from shardprune.solvers.expert_merging import clusters, distances

EXPERTS = 12


@pytest.fixture
def outputs():
    return torch.randn(EXPERTS, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def joined(outputs, experts, count):
    """The clusters of some experts after joining, time and again, the two whose members are nearest on average."""
    found = [(expert,) for expert in experts]
    while len(found) > count:

        def mean(pair):
            parts = [float((outputs[one] - outputs[other]).norm()) for one in pair[0] for other in pair[1]]
            return sum(parts) / len(parts)

        nearest = min(itertools.combinations(found, 2), key=mean)
        found = [one for one in found if one not in nearest] + [tuple(sorted(nearest[0] + nearest[1]))]
    return sorted(found)


def test_distances_are_those_of_mean_outputs(outputs):
    found = distances(40 * outputs, 40)
    pairs = itertools.combinations(range(EXPERTS), 2)
    assert found == pytest.approx([float((outputs[one] - outputs[other]).norm()) for one, other in pairs])


@pytest.mark.parametrize("count", range(1, EXPERTS + 1))
def test_the_nearest_clusters_are_joined(outputs, count):
    scores = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(0)).tolist()
    found = clusters(distances(outputs, 1), scores, count)
    assert sorted(found.values()) == joined(outputs, range(EXPERTS), count)
    assert list(found) == sorted(found)
    assert all(first == max(members, key=lambda expert: scores[expert]) for first, members in found.items())


def test_no_cluster_has_experts_of_two_groups(outputs):
    found = clusters(distances(outputs, 1), [0.0] * EXPERTS, 6, groups=3)
    of_groups = [joined(outputs, range(start, start + 4), 2) for start in (0, 4, 8)]
    assert sorted(found.values()) == sorted(itertools.chain(*of_groups))
    assert all(first == members[0] for first, members in found.items())  # of equal scores the first


def test_protected_experts_are_alone_as_far_as_one_is_left_for_the_others(outputs):
    scores = [float(expert) for expert in range(EXPERTS)]
    found = clusters(distances(outputs, 1), scores, 5, protected={2, 9})
    assert {2: (2,), 9: (9,)}.items() <= found.items()
    assert sorted(found.values()) == sorted(
        [(2,), (9,), *joined(outputs, sorted({*range(EXPERTS)} - {2, 9}), 3)],
    )
    assert len(found) == 5
    found = clusters(distances(outputs, 1), scores, 3, protected=range(1, EXPERTS))
    assert found == {9: tuple(range(10)), 10: (10,), 11: (11,)}
    assert clusters(distances(outputs, 1), scores, 1, protected={4}) == {11: tuple(range(EXPERTS))}


def test_experts_that_give_the_same_are_joined_first():
    outputs = torch.tensor([[0.0], [5.0], [0.0], [9.0], [5.0]]).double()
    assert clusters(distances(outputs, 1), [1, 3, 2, 0, 3], 3) == {1: (1, 4), 2: (0, 2), 3: (3,)}
