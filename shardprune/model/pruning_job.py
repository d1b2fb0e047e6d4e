"""Pruning jobs: what is to be done to the layers of a model, whichever recipe asks for it. Read without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shardprune.solvers.allocation.allocation import Projection, Share, Sparsities
from shardprune.solvers.allocation.allocations import ALLOCATIONS
from shardprune.solvers.allocation.budget import TOLERANCE
from shardprune.solvers.allocation.knapsack import Curve, share_out
from shardprune.solvers.allocation.mixed import in_groups, nearness
from shardprune.solvers.expert_scores import ExpertScore
from shardprune.solvers.improving import NOTHING, Improving
from shardprune.solvers.methods import DAMPING, DAMPINGS, METHODS, Damping, Effort
from shardprune.solvers.pattern import Mixed, Pattern
from shardprune.solvers.rebuilding import Rebuilding
from shardprune.solvers.scoring import Scoring

if TYPE_CHECKING:
    from shardprune.solvers.outliers import Outliers
    from shardprune.solvers.statistics import Kind

Shares = dict[tuple[int, str], Share]  # of each projection by layer and name
Curves = Mapping[tuple[int, str], Curve]  # error curves, likewise
Shapes = Sequence[dict[str, tuple[int, int]]]  # [rows, cols] of every projection, by layer and name


@dataclass(frozen=True)
class Zeroing:
    """Weights that become zero: a `method` of the table of methods prunes by `pattern`.

    `target` is the fraction of the projections' weights that are zero or gone in the end. An `allocation` of the table
    of allocations shares it out, from outlier ratios at M = `outlier_m`, within `spread` (lambda) on either side. With
    `refit`, kept weights are fitted to the dense outputs in the end. `damping` is what Gram matrices get, where the
    method takes it. Sparsities that are `given` take the place of the allocation's. `all_tokens` add to the statistics
    of every expert, not those alone that are routed to it.
    """

    method: str
    pattern: Pattern | Mixed
    target: float
    allocation: str
    outlier_m: float
    spread: float
    refit: bool = False
    damping: Damping = DAMPING
    given: Sparsities | None = None
    all_tokens: bool = False

    def effort(self, measured: bool) -> Effort:
        """Return the work for the projections that read one input.

        Args:
            measured: solutions are tried before, on sums over held-out windows.
        """
        effort = METHODS[self.method].effort
        effort = effort.refitted if self.refit else effort
        tried = (len(DAMPINGS) if self.damping == "auto" else 1) if measured else 0
        return effort.times(tried + 1)

    @property
    def needs(self) -> "Kind | None":
        """The kind of statistics that it takes."""
        return "gram" if self.refit else METHODS[self.method].needs

    @property
    def observes(self) -> bool:
        """Whether the allocation looks at outlier ratios."""
        return ALLOCATIONS[self.allocation].observes

    @property
    def measures(self) -> bool:
        """Whether the allocation shares out error curves, which are measured."""
        return ALLOCATIONS[self.allocation].allocate is None

    @property
    def damping_of_curves(self) -> float:
        """The damping with which error curves are measured."""
        return DAMPING if self.damping == "auto" else self.damping

    def of_rest(self, removed: float) -> float:
        """Return the fraction to zero of the weights that are left, after a fraction `removed` of all is gone."""
        fixed = self.pattern.sparsity  # structures are whole: they may have met the target alone
        return fixed if fixed is not None else max(0.0, (self.target - removed) / (1 - removed))

    def shares(self, shapes: Shapes, outliers: "list[Outliers]", removed: float, curves: Curves) -> Shares:
        """Return what every projection gives up.

        Args:
            outliers: by layer, where the allocation observes; else empty.
            removed: the fraction of the weights that is gone already.
            curves: of all projections, where the allocation measures them; else empty.
        """
        projections = [
            Projection(index, name, rows * cols)
            for index, layer in enumerate(shapes)
            for name, (rows, cols) in layer.items()
        ]
        allocation, target = ALLOCATIONS[self.allocation], self.of_rest(removed)
        if self.given:
            sparsities = self.given
        elif allocation.allocate:
            sparsities = allocation.allocate(projections, outliers, target, self.spread)
        else:
            weights = {(projection.layer, projection.name): projection.weights for projection in projections}
            # Structures may have met the target alone.
            sparsities = share_out(curves, weights, target) if target else dict.fromkeys(weights, 0.0)
        tolerance = TOLERANCE
        if isinstance(self.pattern, Mixed):
            sizes = {index: sum(rows * cols for rows, cols in layer.values()) for index, layer in enumerate(shapes)}
            sparsities = in_groups(sparsities, target, self.pattern.m, sizes)
            tolerance = nearness(self.pattern.m, [size for size in sizes.values() if size])
        spent = sum(sparsities[projection.layer, projection.name] * projection.weights for projection in projections)
        mean = spent / sum(projection.weights for projection in projections)
        assert not allocation.exact or abs(mean - target) <= tolerance, f"{self.allocation} allocates {mean}"
        ratios = {(layer, name): ratio for layer, of in enumerate(outliers) for name, ratio in of.projections.items()}
        return {key: Share(sparsity, ratios.get(key)) for key, sparsity in sparsities.items()}


@dataclass(frozen=True)
class Adopted:
    """Zeros taken over from the checkpoint `sparse`, by `pattern`: N:M, `unstructured`, or `auto`, the pattern that the
    zeros of each projection show."""

    sparse: str
    pattern: str


@dataclass(frozen=True)
class WidthRemoval:
    """Key/value groups and neurons that go from every layer, until a `share` of the layers' weights is gone; the number
    of neurons stays a multiple of `neuron_multiple`, and both divide over `tensor_parallel` devices."""

    share: float
    neuron_multiple: Literal["auto"] | int
    tensor_parallel: int
    scoring: Scoring


@dataclass(frozen=True)
class PathRemoval:
    """Layers, groups and neurons that go iteration by iteration (MoP)."""

    scoring: Scoring


@dataclass(frozen=True)
class ExpertRemoval:
    """Experts that go from every layer that has some, those with the lowest `score`: a share of them, as far as the
    rest is a multiple of `multiple`, or all but `keep`. With `protect`, experts with extreme outputs stay. With
    `merge`, experts whose outputs are alike become one, and none goes."""

    score: ExpertScore
    remove: float | None
    keep: int | None
    multiple: int
    protect: bool
    merge: bool = False


@dataclass(frozen=True)
class PruningJob:
    """What a run does to the layers. Masks of zeroed weights may be rebuilt; output errors may be measured; further
    steps may improve the layers."""

    zeroing: Zeroing | Adopted | None
    removal: WidthRemoval | PathRemoval | ExpertRemoval | None
    rebuilding: Rebuilding | None
    measure_error: bool
    improving: Improving = NOTHING

    @property
    def sparse(self) -> str | None:
        """The checkpoint whose zeros are taken over."""
        return self.zeroing.sparse if isinstance(self.zeroing, Adopted) else None

    @property
    def target(self) -> float | None:
        """The fraction of the projections' weights that become zero or go; None where a sparse checkpoint says it, or
        a path."""
        if isinstance(self.removal, WidthRemoval):
            return self.removal.share
        return self.zeroing.target if isinstance(self.zeroing, Zeroing) else None

    @property
    def effort(self) -> Effort:
        """The work of zeroing weights."""
        return self.zeroing.effort(self.improving.measured) if isinstance(self.zeroing, Zeroing) else Effort()

    @property
    def observed_m(self) -> float | None:
        """The M of the outlier ratios that the allocation looks at; None where it looks at none."""
        zeroing = self.zeroing
        return zeroing.outlier_m if isinstance(zeroing, Zeroing) and zeroing.observes else None

    @property
    def measures(self) -> bool:
        """Whether error curves are measured for the allocation."""
        return isinstance(self.zeroing, Zeroing) and self.zeroing.measures

    @property
    def scoring(self) -> Scoring | None:
        """How structures are chosen, where some go."""
        return self.removal.scoring if isinstance(self.removal, WidthRemoval | PathRemoval) else None
