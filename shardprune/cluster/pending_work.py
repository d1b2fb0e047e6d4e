"""Pending work: what a pruning run still has to do to a model's layers."""

from dataclasses import dataclass, field

from shardprune.cluster.solution_parts import cost_of_solution, narrowing_parts, solution_parts
from shardprune.model.families import Family
from shardprune.model.pruning_job import Shapes, Shares
from shardprune.model.structure.shape import Widths
from shardprune.shard.forward_worker import dense_stream
from shardprune.solvers.allocation.allocation import Share
from shardprune.solvers.improving import NOTHING, Improving
from shardprune.solvers.methods import Effort
from shardprune.solvers.rebuilding import Rebuilding


@dataclass(frozen=True)
class PendingWork:
    """The unfinished part of a pruning job, laid out by layer and projection.

    `shares` says what each projection gives up (empty where a sparse checkpoint says it), `finished` are the
    layers that are done already, `shapes` has [rows, cols] of every projection by layer, `layer_outliers` the
    layers' outlier ratios where the allocation looked at them, `rebuilding` how masks are rebuilt, if they are.
    Where there are `widths`, layers become that narrow instead of sparse; where they are not corrected, the next
    layer sees the image under the layer as it was (`passes_on_dense`), and one pass over it does. `effort` is that of
    a solution, `improving` are further steps, which are kept where they improve the layer. Experts are solved in
    `chunks`, one after the other.
    """

    shares: Shares
    finished: frozenset[int]
    family: Family
    shapes: Shapes
    layer_outliers: list[float]
    rebuilding: Rebuilding | None
    measure_error: bool
    widths: Widths | None = None
    passes_on_dense: bool = False
    effort: Effort = field(default_factory=Effort)
    improving: Improving = NOTHING
    chunks: int = 1

    def chunks_of(self, layer: int) -> tuple[tuple[int, ...], ...]:
        """The places of a layer's inputs that are solved together: one chunk after the other."""
        return self.family.kinds[layer].chunks(self.chunks)

    def shares_of(self, layer: int, names: tuple[str, ...]) -> dict[str, Share]:
        """The shares of some of a layer's projections."""
        return {name: self.shares[layer, name] for name in names if (layer, name) in self.shares}

    def pending(self, segment: range) -> range:
        """The layers of a segment up to its last unfinished one: nothing waits for the image of a later one."""
        unfinished = [layer for layer in segment if layer not in self.finished]
        return range(segment.start, unfinished[-1] + 1) if unfinished else range(0)

    def is_bare(self, layer: int) -> bool:
        """Whether a layer has no projections: waves pass through it as they do through a finished one."""
        return not self.family.kinds[layer].inputs

    def streams(self, stream: str) -> tuple[str, ...]:
        """The names of the waves that go through the layers together: those of `stream`, and beside them the dense
        model's, where steps need them that improve a layer."""
        return (stream, dense_stream(stream)) if self.improving else (stream,)

    def parts(self, segments: tuple[range, ...], waves: int, tokens: int, held_out: int = 0) -> int:
        """The number of parts that pruning reports to its progress step. A wave's pass is one: over every unfinished
        layer and once over every finished one, but none beyond the pruning of the last. Solutions and the writing of
        unfinished layers come on top.

        Args:
            tokens: of a wave.
            held_out: waves beside the others.
        """
        parts = 0
        for segment in segments:
            pending = self.pending(segment)
            for layer in pending:
                if layer in self.finished or self.is_bare(layer):
                    parts += len(self.streams("")) * (waves + held_out) + (layer not in self.finished)
                    continue
                parts += waves * self._passes(layer, False) + held_out * self._passes(layer, True)
                parts += self._parts_of_solutions(layer, tokens) + 1
            if pending and not self.passes_on_dense:
                parts -= (waves + held_out) * (len(self.streams("")) if self.is_bare(pending[-1]) else 1)
        return parts

    def _passes(self, layer: int, held_out: bool) -> int:
        """The passes of a wave over an unfinished layer, in whole or in part."""
        if self.passes_on_dense:
            return 1
        improving, kind = self.improving, self.family.kinds[layer]
        if held_out:  # towards the dense output, into the sums of each chunk, and on; before and after each step
            steps = (len(kind.inputs) if improving.stream_targets else 0) + (improving.reconstruction > 0)
            return 1 + bool(improving) + improving.measured * len(self.chunks_of(layer)) + 2 * steps
        if improving.stream_targets:
            return 1 + len(kind.inputs)
        return 1 + len(self.chunks_of(layer)) + bool(improving) + self.comparing_passes * len(kind.blocks)

    def solve_parts(self, layer: int, names: tuple[str, ...], tokens: int) -> int:
        """The number of parts that solving the projections `names`, which read one input, counts as."""
        return solution_parts(self.effort, self.family.kinds[layer], self.shapes[layer], names, tokens)

    def cost(self, layer: int, names: tuple[str, ...]) -> float:
        """The operations of solving one input of a layer, roughly."""
        return cost_of_solution(self.effort, self.shapes[layer], names)

    def narrow_parts(self, layer: int, tokens: int) -> int:
        """The number of parts that cutting a layer counts as."""
        return narrowing_parts(self.effort, self.family.kinds[layer], self.shapes[layer], tokens)

    def _parts_of_solutions(self, layer: int, tokens: int) -> int:
        if self.widths:
            return self.narrow_parts(layer, tokens) + (self.improving.reconstruction > 0)
        kind = self.family.kinds[layer]
        rebuilt = len(kind.blocks) if self.rebuilding else 0
        solutions = sum(self.solve_parts(layer, names, tokens) for names in kind.inputs)
        return solutions + rebuilt + (self.improving.reconstruction > 0)

    @property
    def comparing_passes(self) -> int:
        """Passes of all waves through a block that is rebuilt: for gradients, and for errors before and after."""
        if self.rebuilding is None:
            return 0
        return max(self.rebuilding.needs_gradients, self.measure_error) + self.measure_error
