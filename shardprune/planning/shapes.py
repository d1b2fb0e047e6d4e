"""The shapes of decoder layers: their inputs, and the linear maps that read them."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from shardprune.model.experts import DOWN
from shardprune.model.families import LayerKind


@dataclass(frozen=True)
class Input:
    """One input of a decoder layer: its `cols`, and the rows of the projections that read it; `output` says whether the
    residual stream gets what these give, `share` which part of all tokens the input has (an expert's)."""

    cols: int
    rows: dict[str, int]
    output: bool = False
    share: float = 1.0

    @property
    def size(self) -> tuple[int, ...]:
        """The columns, and the rows of each projection."""
        return self.cols, *self.rows.values()

    @property
    def largest(self) -> int:
        """Weights of the largest projection."""
        return self.cols * max(self.rows.values())

    @property
    def weights(self) -> int:
        """Weights of all projections that read it."""
        return self.cols * sum(self.rows.values())

    @property
    def differences(self) -> int:
        """Entries of the sums of differences times the input, for targets in the dense stream."""
        return self.cols * (sum(self.rows.values()) if self.output else self.cols)


@dataclass(frozen=True)
class LayerShape:
    """The shape of the decoder layers of one kind.

    Attributes:
        inputs: those of projections.
        maps: the inputs of all linear maps, pruned or not.
        elements: parameters.
        matrices: those of them that have two or more dimensions.
        attends: attentions of the layer; 0 where nothing of it is attention.
        kind: the modules.
        routers: the inputs of the maps that score experts, of a model that has lost some of these.
    """

    inputs: tuple[Input, ...]
    maps: tuple[Input, ...]
    elements: int
    matrices: int
    attends: int
    kind: LayerKind
    routers: tuple[Input, ...] = ()

    @cached_property
    def multiplied(self) -> int:
        """Elements of the matrices that a token is multiplied with."""
        if not self.kind.runs:
            return 0
        return self.matrices - round(sum((1 - one.share) * one.weights for one in self.maps))

    @cached_property
    def by_first(self) -> dict[str, Input]:
        """The inputs by the first projection that reads each."""
        return {next(iter(one.rows)): one for one in self.inputs}

    @cached_property
    def experts(self) -> int:
        """Experts of all mixtures."""
        return sum(self.kind.experts.values())

    @cached_property
    def expert_weights(self) -> int:
        """Elements of all experts."""
        return sum(one.weights for one in self.maps if one.share < 1)

    def commons(self, places: Iterable[int]) -> list[int]:
        """Return the columns of the inputs of those mixtures whose experts read some of the inputs: all tokens' sums
        are a part of each expert's."""
        found = {}
        for place in places:
            names = self.kind.inputs[place]
            path = self.kind.mixture_of(names[0])
            if path is not None and not names[0].endswith(f".{DOWN}"):
                found[path] = self.inputs[place].cols
        return list(found.values())

    @cached_property
    def largest(self) -> int:
        """Elements of the largest linear map."""
        return max((one.largest for one in self.maps), default=0)
