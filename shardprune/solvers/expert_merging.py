"""Clusters of a layer's experts whose outputs are alike, each of which becomes one expert.

HC-SMoE (arXiv 2410.08589): an expert is known by its mean output over all tokens that enter the mixture, whether they
are routed to it or not; clusters are joined by average linkage over Euclidean distances.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardprune.solvers.expert_scores import ranked


def distances(sums: Tensor, tokens: int) -> tuple[float, ...]:
    """Return the Euclidean distance between the mean outputs of every two experts, [experts * (experts - 1) / 2]: of
    the first expert and each behind it, then of the second one, and so on.

    Args:
        sums: of the outputs for `tokens` tokens, float64 [experts, hidden].
    """
    return tuple(torch.pdist(sums / tokens).tolist())


def clusters(
    apart: Sequence[float], scores: Sequence[float], count: int, groups: int = 1, protected: Collection[int] = ()
) -> dict[int, tuple[int, ...]]:
    """Return clusters of a layer's experts, each by its expert with the highest score (of equal ones the first),
    ascending.

    Args:
        apart: distances between experts, as `distances` gives them.
        scores: by expert.
        count: of clusters, as many in each of the groups.
        groups: runs of experts of the same length, from which a router chooses first; no cluster has experts of two.
        protected: experts that are alone in their clusters, as far as one more is left for the others of their group.
    """
    from scipy.spatial.distance import squareform

    assert len(scores) % groups == 0, "groups of different sizes"
    assert count % groups == 0, "not the same number from each group"
    size, own = len(scores) // groups, count // groups
    square = squareform(np.asarray(apart, dtype=np.float64))
    found: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(scores), size):
        experts = ranked(range(start, start + size), scores, protected)
        alone = [expert for expert in experts if expert in protected][: own - 1]
        rest = sorted({*experts} - {*alone})
        for members in (*((expert,) for expert in alone), *_joined(square, rest, own - len(alone))):
            found[ranked(members, scores)[0]] = members
    return dict(sorted(found.items()))


def _joined(square: NDArray[np.float64], experts: list[int], count: int) -> Iterator[tuple[int, ...]]:
    """Yield so many clusters of some experts, each ascending; of all experts the distances are [experts, experts]."""
    from scipy.cluster.hierarchy import average
    from scipy.spatial.distance import squareform

    parts: dict[int, tuple[int, ...]] = {place: (expert,) for place, expert in enumerate(experts)}
    if count < len(experts):
        merges = average(squareform(square[np.ix_(experts, experts)], checks=False))
        for place, (one, other, *_) in enumerate(merges[: len(experts) - count]):
            parts[len(experts) + place] = tuple(sorted((*parts.pop(int(one)), *parts.pop(int(other)))))
    yield from parts.values()
