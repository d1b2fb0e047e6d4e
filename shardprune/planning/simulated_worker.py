"""A worker that only knows how long everything takes: its clock, its layers, and what it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shardprune.cluster.group import Ref
from shardprune.planning.costs import Costs
from shardprune.shard.ledger import Kind


@dataclass
class Call(Ref[Any]):
    """One call: when it was `done`, the value that the driver gets, and what travels to other workers."""

    done: float
    value: Any = None
    count: int = 0
    source: tuple[int, int] = (0, 0)
    arrived: dict[int, float] = field(default_factory=dict)  # by node


@dataclass
class Stretch:
    """The time in which a worker does nothing but calls of one verb, or reads: simulated seconds."""

    start: float
    end: float
    verb: str
    kind: Kind


@dataclass
class Worker:
    """One worker's clock, its layers, and what it did; `costs` are seen at the layer that a call is about, `sizes` are
    the sequences of the waves on their way."""

    costs: Costs
    sizes: dict[int, int]
    layers: tuple[int, ...]
    free: float = 0.0
    now: float = 0.0  # when the call begins that it is asked for
    file: float = 0.0  # when the file that it writes is there
    held: set[int] = field(default_factory=set)
    summed: set[int] = field(default_factory=set)  # layers over whose inputs it has sums, for solving
    cut: set[int] = field(default_factory=set)  # layers whose experts are gone, and which are read anew
    gathered: set[int] = field(default_factory=set)  # layers over whose inputs it has sums, for error curves
    ahead: tuple[int, float] | None = None  # the layer that is being read, and when it is there
    frame: set[str] = field(default_factory=set)
    remembered: set[str] = field(default_factory=set)  # projections that may be put back
    spans: list[Stretch] = field(default_factory=list)
    busy: float = 0.0
    reading: float = 0.0

    def begin(self, costs: Costs) -> None:
        """Become the worker of another run, which has nothing in memory yet."""
        self.costs = costs
        for known in (self.held, self.summed, self.cut, self.gathered, self.frame, self.remembered):
            known.clear()
        self.ahead = None

    @property
    def changing(self) -> Costs:
        """The costs at the layer in work, as it is while it is changed."""
        return self.costs.of_cut

    def seen(self, layers: Sequence[int]) -> Costs:
        """Return the costs of layers as they are now, where they may have lost structures."""
        narrowed = self.costs.task.model.narrower and self.cut.issuperset(layers)
        return self.costs.of_cut if narrowed else self.costs

    def size_of(self, wave: int) -> int:
        """Return the number of sequences of a wave."""
        return self.sizes[wave]

    def note(self, start: float, end: float, verb: str, kind: Kind | None) -> None:
        """Note what the worker does from `start` to `end`."""
        if end <= start:
            return
        assert kind is not None, f"{verb} takes time and is no verb"
        last = self.spans[-1] if self.spans else None
        if last and last.verb == verb and start - last.end < 1e-9:
            last.end = end
        else:
            self.spans.append(Stretch(start, end, verb, kind))
