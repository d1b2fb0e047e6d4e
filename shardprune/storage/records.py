"""Records of finished layers: a layer file says in its header, as JSON, what was done to its layer.

A worker makes the reports, the driver puts them together, and whoever reads the file gets the same classes back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from shardprune.storage.json_file import Measurement, fitting

Count = Annotated[int, Field(ge=0, strict=True)]
Weights = Annotated[int, Field(gt=0, strict=True)]
Known = ConfigDict(extra="forbid")  # a field that this version does not know is of another version


@dataclass(frozen=True)
class ProjectionReport:
    """A projection as it was written.

    `target` is the fraction of zeros that was asked for; `zeros` of its `weights` are counted on the tensor written,
    `zeros_before` on the dense one. `error` is ||XW - XW'||^2 / ||XW||^2 where it was measured, `outliers` the
    percentage of outliers where the allocation looked at them, `pattern` its N:M. The solver needed so many `retries`
    and ended with the `damping`, where it factorises; `sweep` is the way of its steps over columns (`kernel` or
    `recursion`), where it has any. All its zeros were chosen in so many `iterations`, and its kept weights fitted in so
    many `refit_steps`, where they were. `update` is the way of a masked low-rank update (`kernel` or `products`), where
    there was one, and `zeros_kept` of the zeros before are still zero, where that was counted. The calibration `tokens`
    are those that were routed to it, if it is a part of an expert.
    """

    __pydantic_config__: ClassVar[ConfigDict] = Known

    layer: Count
    name: str
    target: float
    zeros: Count
    zeros_before: Count
    weights: Weights
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d*:[1-9]\d*$")] | None = None
    retries: Count = 0
    damping: float | None = None
    sweep: str | None = None
    iterations: Count | None = None
    refit_steps: Count | None = None
    outliers: float | None = None
    error: float | None = None
    update: str | None = None
    zeros_kept: Count | None = None
    tokens: Count | None = None

    @property
    def achieved(self) -> float:
        """The fraction of zeros."""
        return self.zeros / self.weights


@dataclass(frozen=True)
class BlockReport:
    """A block whose masks were rebuilt: the pairs of weights swapped, and ||dense - sparse||^2 / ||dense||^2 of its
    output over the calibration data before and after, where it was measured."""

    __pydantic_config__: ClassVar[ConfigDict] = Known

    layer: Count
    block: str
    swaps: Count
    error_before: float | None = None
    error_after: float | None = None


@dataclass(frozen=True)
class ImprovementReport:
    """A step that was meant to improve a layer (`stream targets`), by the `projections` that it changes. The errors are
    those of the layer's output on held-out windows before and after it, ||output - dense output||^2 / ||dense output -
    dense input||^2; the step was `kept` where its error is less, else undone."""

    __pydantic_config__: ClassVar[ConfigDict] = Known

    layer: Count
    step: str
    projections: tuple[str, ...]
    error_before: Measurement
    error_after: Measurement
    kept: bool


@dataclass(frozen=True)
class KeptStructures:
    """Structures that a layer has kept: indices of key/value `groups` and `neurons`. `errors` are the relative output
    errors of the output projections where they were measured, `retries` those of the solver."""

    __pydantic_config__: ClassVar[ConfigDict] = Known

    groups: tuple[Count, ...]
    neurons: tuple[Count, ...]
    errors: dict[str, Measurement]
    retries: Count


@dataclass(frozen=True)
class KeptExperts:
    """The experts of a layer that it has kept, by their numbers in the dense model, which has `of` of them.

    Where experts were merged, each is the average of its `members`, itself among them, by their `weights`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = Known

    kept: tuple[Count, ...]
    of: Weights
    members: tuple[tuple[Count, ...], ...] = ()
    weights: tuple[tuple[Count, ...], ...] = ()

    def sources(self, place: int) -> tuple[tuple[int, int], ...]:
        """Return the experts of the dense model of which the one at a place is made, each with its weight."""
        if not self.members:
            return ((self.kept[place], 1),)
        return tuple(zip(self.members[place], self.weights[place], strict=True))


@dataclass(frozen=True)
class LayerSizes:
    """Numbers of weights and zeros of a layer's projections before structures were removed, and of what is left."""

    __pydantic_config__: ClassVar[ConfigDict] = Known

    weights_before: Weights
    zeros_before: Count
    weights: Weights
    zeros: Count


@dataclass(frozen=True)
class LayerRecord:
    """A finished layer: `projections` where weights became zero, `blocks` where masks were rebuilt, `improvements`
    where further steps were tried, its percentage of `outliers` where the allocation looked at it; what it `kept` and
    its `sizes` where structures were removed, its `experts` where some of them were."""

    __pydantic_config__: ClassVar[ConfigDict] = Known

    layer: Count
    projections: tuple[ProjectionReport, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    outliers: float | None = None
    kept: KeptStructures | None = None
    sizes: LayerSizes | None = None
    improvements: tuple[ImprovementReport, ...] = ()
    experts: KeptExperts | None = None

    @property
    def zeros(self) -> int:
        """The zeros of all projections."""
        return self.sizes.zeros if self.sizes else sum(report.zeros for report in self.projections)

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros over all projections; None where no weights became zero."""
        weights = sum(report.weights for report in self.projections)
        return self.zeros / weights if weights else None

    @property
    def error(self) -> float | None:
        """The mean relative output error of the projections where it was measured."""
        errors = [report.error for report in self.projections if report.error is not None]
        if self.kept:
            errors += self.kept.errors.values()
        return sum(errors) / len(errors) if errors else None

    def plain(self) -> dict[str, Any]:
        """The record as plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> "LayerRecord":
        """Return the record that `plain` gave these values of.

        Raises:
            Malformed: they are those of no record of this version.
        """
        return fitting(dict(fields), cls)
