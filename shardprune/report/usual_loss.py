"""The loss of perplexity that is usual for a way of pruning and a share, as far as docs/quality.md has measured it."""

from dataclasses import dataclass
from typing import NamedTuple

from shardprune.report.result import Result

NEAR = 0.025  # between shares that are compared with one another
DENSE = 0.01  # of a dense model's weights are zero, at most


class Way(NamedTuple):
    """The method of a run's zeros and what was done beside it, or the structures that it removed; the pattern of the
    zeros, empty for structures; and the share of the projections' weights that became zero, or of all parameters or
    experts that went."""

    name: str
    pattern: str
    share: float


@dataclass(frozen=True)
class Usual:
    """A row of "What is usual" in docs/quality.md: a range of perplexities after pruning, in those of the dense model.

    Attributes:
        way: with `pattern` and `share` as a run's `Way` has them.
        least: the loss with the allocation, score and calibration text that do best.
        most: the loss with those that do worst.
    """

    way: str
    pattern: str
    share: float
    least: float
    most: float

    @property
    def name(self) -> str:
        of = f" {self.pattern}" if ":" in self.pattern else ""
        return f"{self.way}{of} at {100 * self.share:g}%"

    def is_near(self, share: float) -> bool:
        """Return whether a run with this share is to be compared with the row."""
        return abs(self.share - share) <= NEAR


USUAL = (
    Usual("magnitude", "unstructured", 0.7, 1.93, 2.18),
    Usual("magnitude, rebuilt", "unstructured", 0.7, 1.81, 2.78),
    Usual("wanda", "unstructured", 0.5, 1.10, 1.16),
    Usual("wanda", "unstructured", 0.6, 1.26, 1.40),
    Usual("wanda", "unstructured", 0.7, 1.73, 2.39),
    Usual("wanda", "unstructured", 0.8, 3.91, 6.33),
    Usual("wanda", "2:4", 0.5, 1.30, 1.39),
    Usual("wanda", "4:8", 0.5, 1.17, 1.26),
    Usual("wanda, rebuilt", "unstructured", 0.7, 1.78, 3.38),
    Usual("sparsegpt", "unstructured", 0.5, 1.03, 1.16),
    Usual("sparsegpt", "unstructured", 0.6, 1.07, 1.40),
    Usual("sparsegpt", "unstructured", 0.7, 1.18, 2.18),
    Usual("sparsegpt", "unstructured", 0.8, 1.46, 4.93),
    Usual("sparsegpt", "2:4", 0.5, 1.06, 1.35),
    Usual("sparsegpt", "4:8", 0.5, 1.04, 1.24),
    Usual("sparsegpt, rebuilt", "unstructured", 0.7, 1.81, 3.21),
    Usual("sparsegpt, trained", "unstructured", 0.5, 1.02, 1.12),
    Usual("sparsegpt, trained", "unstructured", 0.6, 1.05, 1.29),
    Usual("sparsegpt, trained", "unstructured", 0.7, 1.10, 1.84),
    Usual("sparsegpt, trained", "unstructured", 0.8, 1.28, 3.91),
    Usual("sparsegpt, trained", "2:4", 0.5, 1.05, 1.26),
    Usual("sparsegpt, trained", "4:8", 0.5, 1.03, 1.18),
    Usual("alps", "unstructured", 0.5, 1.01, 1.11),
    Usual("alps", "unstructured", 0.6, 1.03, 1.28),
    Usual("alps", "unstructured", 0.7, 1.08, 1.67),
    Usual("alps", "unstructured", 0.8, 1.26, 3.48),
    Usual("alps", "2:4", 0.5, 1.05, 1.26),
    Usual("alps", "4:8", 0.5, 1.03, 1.20),
    Usual("alps, trained", "unstructured", 0.5, 1.01, 1.10),
    Usual("alps, trained", "unstructured", 0.6, 1.02, 1.23),
    Usual("alps, trained", "unstructured", 0.7, 1.05, 1.57),
    Usual("alps, trained", "unstructured", 0.8, 1.15, 2.90),
    Usual("alps, trained", "2:4", 0.5, 1.04, 1.23),
    Usual("alps, trained", "4:8", 0.5, 1.03, 1.16),
    Usual("depth", "", 0.1, 1.13, 1.14),
    Usual("depth", "", 0.2, 1.29, 1.75),
    Usual("depth", "", 0.3, 1.53, 2.02),
    Usual("depth", "", 0.4, 1.92, 2.81),
    Usual("width", "", 0.1, 1.13, 1.22),
    Usual("width", "", 0.2, 1.46, 2.25),
    Usual("width", "", 0.3, 1.97, 3.90),
    Usual("width", "", 0.4, 3.84, 10.18),
    Usual("mop", "", 0.1, 1.13, 1.17),
    Usual("mop", "", 0.2, 1.47, 1.73),
    Usual("mop", "", 0.3, 1.92, 2.68),
    Usual("mop", "", 0.4, 2.61, 4.23),
    Usual("experts", "", 0.125, 1.01, 1.04),
    Usual("experts", "", 0.25, 1.02, 1.07),
    Usual("experts", "", 0.375, 1.04, 1.10),
    Usual("experts", "", 0.5, 1.06, 1.13),
)


def usual_loss(way: Way) -> Usual | None:
    """Return the row for a way and its share, or where there is none the next one with a larger share, whose most a
    smaller share should not lose; None where there is neither."""
    rows = [row for row in USUAL if (row.way, row.pattern) == way[:2] and row.share >= way.share - NEAR]
    return min(rows, key=lambda row: row.share, default=None)


def way_of(result: Result) -> Way | None:
    """Return the way of a run from a dense model to one pruned in one way; None for all others."""
    recipe = result.recipe
    if result.sparsity and result.sparsity.before > DENSE:
        return None
    trained = ", trained" if recipe.get("reconstruct") else ""
    if result.experts:
        merged = ", merged" if result.experts.merged else ""
        return Way(f"experts{merged}{trained}", "", 1 - result.experts.after / result.experts.before)
    if result.command == "mop" and result.structure:
        steps = {entry.step for entry in result.structure.path or ()}
        return Way(f"{'depth' if steps == {'L'} else 'mop'}{trained}", "", result.model.removed)
    if result.command != "prune" or result.sparsity is None:
        return None
    if not result.sparsity.projections:
        return Way(f"width{trained}", "", result.model.removed)
    if result.model.removed:  # zeros beside structures
        return None
    rebuilt = ", rebuilt" if recipe.get("rebuild", "none") != "none" else ""
    return Way(f"{recipe.get('method')}{rebuilt}{trained}", str(recipe.get("pattern")), result.sparsity.achieved)
