"""The shortest ends of names that tell them apart."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def shortest_tails(
    names: Mapping[K, Sequence[str]], least: Callable[[Sequence[str]], int] = lambda parts: 1
) -> dict[K, Sequence[str]]:
    """Return the last parts of each name, as many as it takes to tell it from all others.

    Args:
        names: the parts of each name.
        least: returns the fewest parts of a name.
    """
    found: Counter[tuple[str, ...]] = Counter()
    for parts in names.values():
        found.update(tuple(parts[-count:]) for count in range(1, len(parts) + 1))
    tails = {}
    for key, parts in names.items():
        count = least(parts)
        while count < len(parts) and found[tuple(parts[-count:])] > 1:
            count += 1
        tails[key] = parts[-count:]
    return tails
