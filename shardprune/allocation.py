"""Which projection gives up how much. A new allocation is one function and one line in the table."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Projection:
    """One projection of a model: its layer, its name and its number of weights."""

    layer: int
    name: str
    weights: int


Allocation = Callable[[list[Projection], float], dict[tuple[int, str], float]]


def uniform(projections: list[Projection], target: float) -> dict[tuple[int, str], float]:
    """The same sparsity for every projection."""
    return {(projection.layer, projection.name): target for projection in projections}


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform}
