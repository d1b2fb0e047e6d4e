"""The share of solutions in the progress of a step, of which the pass of a wave over a layer is one part."""

from collections.abc import Mapping, Sequence

from shardprune.model.families import LayerKind
from shardprune.solvers.methods import Effort


def cost_of_solution(effort: Effort, shapes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> float:
    """Return the operations of solving the projections `names`, which read one input of a layer, roughly; where nothing
    is multiplied, their share of the work in the same measure.

    Args:
        shapes: [rows, cols] of the layer's projections.
    """
    rows, cols = _size(shapes, names)
    return effort.operations(rows, cols) or cols**3 + rows * cols**2


def solution_parts(
    effort: Effort, kind: LayerKind, shapes: Mapping[str, tuple[int, int]], names: Sequence[str], tokens: int
) -> int:
    """Return the number of parts that solving the projections `names`, which read one input of a layer, counts as: that
    of as many waves as would take about as many operations, and at least one.

    Args:
        shapes: [rows, cols] of the layer's projections.
        tokens: of a wave.
    """
    forward = sum(rows * cols for rows, cols in shapes.values())
    sums = sum(shapes[group[0]][1] ** 2 for group in kind.inputs)
    return max(1, round(effort.operations(*_size(shapes, names)) / (tokens * (forward + sums))))


def narrowing_parts(effort: Effort, kind: LayerKind, shapes: Mapping[str, tuple[int, int]], tokens: int) -> int:
    """Return the number of parts that making a layer narrower counts as: the solutions of its output projections.

    Args:
        shapes: [rows, cols] of the layer's projections.
        tokens: of a wave.
    """
    if not effort.sweeps:
        return 1
    return sum(solution_parts(effort, kind, shapes, (name,), tokens) for name in kind.structures.columns)


def _size(shapes: Mapping[str, tuple[int, int]], names: Sequence[str]) -> tuple[int, int]:
    """Return the rows of all projections `names`, and the columns of their input."""
    return sum(shapes[name][0] for name in names), shapes[names[0]][1]
