"""The importance of a layer's experts, and the choice of those that stay.

All scores but one are means or sums over the tokens that the router of the dense model gives to an expert, of its
router weight g (as the experts module gets it) and of the norm of its output f before that weight:

    reap                mean of g ||f||_2                  REAP, arXiv 2510.13999, equation 9
    frequency           number of tokens
    weighted-frequency  sum of g
    ean                 sum of ||f||_2
    mean-norm           mean of ||f||_2                    MAN, arXiv 2606.15716
    aimer               -mean |w| / rms(w) of its weights  AIMER, arXiv 2603.18492: the largest ratio goes first

An expert without tokens scores 0. Plain numbers, read without torch: a layer has some hundred experts.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

ExpertScore = Literal["reap", "frequency", "weighted-frequency", "ean", "mean-norm", "aimer"]

# Super experts, as in REAP's code: largest output above this quantile of those of all experts, and above the largest of
# all over TIMES, in the first EARLY of the layers with experts.
QUANTILE, TIMES, EARLY = 0.995, 10, 0.75


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the tokens that were routed to each expert of one layer, by expert.

    Attributes:
        tokens: their number.
        weights: sum of the router weight g.
        norms: sum of ||f||_2, f the output before its weight.
        products: sum of g ||f||_2.
        squares: sum of ||f||_2^2.
        maxima: largest magnitude of an element of f.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]
    norms: tuple[float, ...]
    products: tuple[float, ...]
    squares: tuple[float, ...]
    maxima: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether all sums are."""
        return all(map(math.isfinite, (*self.weights, *self.norms, *self.products, *self.squares, *self.maxima)))

    def lost(self, kept: Collection[int]) -> float:
        """Return the share of the routing weight that the experts had which are not `kept`."""
        whole = math.fsum(self.weights)
        gone = math.fsum(weight for expert, weight in enumerate(self.weights) if expert not in kept)
        return gone / whole if whole else 0.0


def _means(sums: Sequence[float], statistics: ExpertStatistics) -> list[float]:
    return [total / count if count else 0.0 for total, count in zip(sums, statistics.tokens, strict=True)]


ROUTED: dict[str, Callable[[ExpertStatistics], Sequence[float]]] = {
    "reap": lambda statistics: _means(statistics.products, statistics),
    "frequency": lambda statistics: [float(count) for count in statistics.tokens],
    "weighted-frequency": lambda statistics: statistics.weights,
    "ean": lambda statistics: statistics.norms,
    "mean-norm": lambda statistics: _means(statistics.norms, statistics),
}  # the scores that a pass gives


def needs_pass(score: ExpertScore) -> bool:
    """Return whether a score looks at tokens; the others look at the weights alone."""
    return score in ROUTED


def chosen(scores: Sequence[float], count: int, groups: int = 1, protected: Collection[int] = ()) -> tuple[int, ...]:
    """Return the experts of a layer that stay, ascending: those with the highest scores, of equal ones the first.

    Args:
        scores: by expert.
        count: of experts to keep, as many from each of the groups.
        groups: runs of experts of the same length, from which a router chooses first.
        protected: experts that stay before all others.
    """
    assert len(scores) % groups == 0, "groups of different sizes"
    assert count % groups == 0, "not the same number from each group"
    size = len(scores) // groups
    kept: list[int] = []
    for start in range(0, len(scores), size):
        kept += sorted(ranked(range(start, start + size), scores, protected)[: count // groups])
    return tuple(kept)


def ranked(experts: Iterable[int], scores: Sequence[float], protected: Collection[int] = ()) -> list[int]:
    """Return some experts from the highest score to the lowest, of equal ones the first before the others; those that
    are protected come before all."""
    return sorted(experts, key=lambda expert: (expert not in protected, -scores[expert], expert))


def super_experts(maxima: Mapping[int, Sequence[float]]) -> dict[int, frozenset[int]]:
    """Return the experts whose outputs are extreme, by layer, with the bounds of REAP's code.

    Args:
        maxima: of each layer with experts, the largest magnitude of an output's element by expert.
    """
    values = sorted(value for of_layer in maxima.values() for value in of_layer)
    if not values:
        return {}
    bound = max(_quantile(values, QUANTILE), values[-1] / TIMES)
    early = sorted(maxima)[: int(len(maxima) * EARLY)]
    return {
        layer: frozenset(expert for expert, value in enumerate(maxima[layer]) if value > bound)
        if layer in early
        else frozenset()
        for layer in maxima
    }


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Return a quantile, between two values by their distance to it."""
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


def kept_of(experts: int, remove: float, multiple: int) -> int:
    """Return how many of a layer's experts stay where a share of them is to go: the nearest multiple, of two equally
    near the larger."""
    kept = (1 - remove) * experts
    return multiple * math.floor(kept / multiple + 0.5 + 1e-9)
