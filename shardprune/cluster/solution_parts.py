"""The share of solutions in the progress of a step, of which the pass of a wave over a layer is one part."""

from collections.abc import Mapping

from shardprune.model.families import Family


def operations_of_solution(shapes: Mapping[str, tuple[int, int]], names: tuple[str, ...]) -> int:
    """Return the operations of solving the projections `names`, which read one input of a layer, roughly: factorise its
    Hessian, then sweep over the weights.

    Args:
        shapes: [rows, cols] of the layer's projections.
    """
    rows, cols = sum(shapes[name][0] for name in names), shapes[names[0]][1]
    return cols**3 + rows * cols**2


def solution_parts(family: Family, shapes: Mapping[str, tuple[int, int]], names: tuple[str, ...], tokens: int) -> int:
    """Return the number of parts that solving the projections `names`, which read one input of a layer, counts as: that
    of as many waves as would take about as many operations, and at least one.

    Args:
        shapes: [rows, cols] of the layer's projections.
        tokens: of a wave.
    """
    forward = sum(rows * cols for rows, cols in shapes.values())
    sums = sum(shapes[group[0]][1] ** 2 for group in family.inputs)
    return max(1, round(operations_of_solution(shapes, names) / (tokens * (forward + sums))))


def narrowing_parts(family: Family, shapes: Mapping[str, tuple[int, int]], tokens: int, factorises: bool) -> int:
    """Return the number of parts that making a layer narrower counts as: the solutions of its output projections.

    Args:
        shapes: [rows, cols] of the layer's projections.
        tokens: of a wave.
        factorises: whether structures are scored or corrected by the factors of Gram matrices.
    """
    if not factorises:
        return 1
    return sum(solution_parts(family, shapes, (name,), tokens) for name in family.columns)
